// Separable resampling filters: for each output pixel, a window of input pixels and their weights.
#pragma once

#include <cstdint>
#include <vector>

namespace svd_trt::detail {

template <class Weight> struct Window {
  int64_t start;
  std::vector<Weight> weights;
};

// A Gaussian blur, then the cubic kernel of Keys 1981 with aligned corners, from `length` pixels to `size`.
std::vector<Window<float>> blurred_cubic(int64_t length, int64_t size);

// Lanczos with three lobes in 8 bits, of RGB [height, width, 3]: every row to `size` pixels, or every column.
std::vector<uint8_t> lanczos_across(const std::vector<uint8_t> &pixels, int64_t height, int64_t width, int64_t size);
std::vector<uint8_t> lanczos_down(const std::vector<uint8_t> &pixels, int64_t height, int64_t width, int64_t size);

} // namespace svd_trt::detail
