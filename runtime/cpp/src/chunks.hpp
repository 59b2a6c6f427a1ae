// How many frames are decoded together, see docs/bundle.md. The size matters: the decoder's temporal layers see only
// the frames of their chunk.
#pragma once

#include <cstdint>
#include <vector>

#include "manifest.hpp"

namespace svd_trt::detail {

// Sizes of the chunks of `total` frames. Throws Failure (argument) if one is outside `span`.
std::vector<int64_t> chunk_sizes(int64_t total, int64_t chunk, const Range &span);

// The size that is used if the caller chooses none.
int64_t default_chunk(const Manifest &manifest, int64_t frames, int64_t videos, int64_t height, int64_t width);

} // namespace svd_trt::detail
