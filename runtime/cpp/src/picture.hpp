// The picture, and the two tensors that it becomes; the algorithms are those of docs/bundle.md.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "arguments.hpp"
#include "svd_trt.h"

namespace svd_trt::detail {

// Eight-bit RGB without gaps between rows.
struct Picture {
  int64_t width, height;
  std::vector<uint8_t> pixels; // [height, width, 3]
};

// A copy of the caller's picture. Throws Failure (image).
Picture copy_picture(const svd_trt_picture &given);

struct PictureSize {
  int64_t width, height;
};

// The size of what `framed` returns.
PictureSize framed_size(PictureSize size, int64_t height, int64_t width, ResizeMode mode);

// Throws Failure (image): with bars, the picture would be too large for `framed`.
void check_framed(PictureSize size, int64_t height, int64_t width, ResizeMode mode);

// The picture in the shape of the frames, to the nearest pixel; it is not resized.
Picture framed(Picture picture, int64_t height, int64_t width, ResizeMode mode, std::array<uint8_t, 3> background);

// `blur-bicubic-aligned`: [3, size, size], normalised. Writes to `values`.
void clip_pixels(const Picture &picture, int64_t size, const std::array<float, 3> &mean,
                 const std::array<float, 3> &deviation, float *values);

// `lanczos3-across-first`: [3, height, width] in [-1, 1]. Writes to `values`.
void vae_image(const Picture &picture, int64_t height, int64_t width, float *values);

} // namespace svd_trt::detail
