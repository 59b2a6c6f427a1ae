#include "picture.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "error.hpp"
#include "resample.hpp"

namespace svd_trt::detail {
namespace {

constexpr int64_t kLargestSide = 65535;
constexpr int64_t kMostPixels = int64_t{1} << 29;
constexpr int64_t kLargestStride = int64_t{1} << 30; // times the largest side, it is far from overflowing

std::string size_text(int64_t width, int64_t height) { return std::to_string(width) + "x" + std::to_string(height); }

bool too_large(int64_t width, int64_t height) {
  return width > kLargestSide || height > kLargestSide || width * height > kMostPixels;
}

Picture cropped(const Picture &picture, int64_t width, int64_t height) {
  const int64_t left = (picture.width - width) / 2, top = (picture.height - height) / 2;
  Picture part{width, height, std::vector<uint8_t>(static_cast<size_t>(width * height * 3))};
  for (int64_t y = 0; y < height; ++y)
    std::memcpy(&part.pixels[static_cast<size_t>(y * width * 3)],
                &picture.pixels[static_cast<size_t>(((top + y) * picture.width + left) * 3)],
                static_cast<size_t>(width * 3));
  return part;
}

Picture padded(const Picture &picture, int64_t width, int64_t height, std::array<uint8_t, 3> background) {
  const int64_t left = (width - picture.width) / 2, top = (height - picture.height) / 2;
  Picture canvas{width, height, std::vector<uint8_t>(static_cast<size_t>(width * height * 3))};
  for (size_t i = 0; i < canvas.pixels.size(); ++i) canvas.pixels[i] = background[i % 3];
  for (int64_t y = 0; y < picture.height; ++y)
    std::memcpy(&canvas.pixels[static_cast<size_t>(((top + y) * width + left) * 3)],
                &picture.pixels[static_cast<size_t>(y * picture.width * 3)], static_cast<size_t>(picture.width * 3));
  return canvas;
}

// Bytes as fractions of 255.
std::array<float, 256> fractions() {
  std::array<float, 256> table;
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<float>(i) / 255.0f;
  return table;
}

// `length` in the proportion of two others: to the nearest, and to even.
int64_t proportional(int64_t length, int64_t to, int64_t from) {
  const double exact = static_cast<double>(length) * static_cast<double>(to) / static_cast<double>(from);
  return std::max<int64_t>(1, static_cast<int64_t>(std::nearbyint(exact)));
}

} // namespace

Picture copy_picture(const svd_trt_picture &given) {
  if (given.data == nullptr) throw image_error("a picture has no data");
  if (given.width < 1 || given.height < 1)
    throw image_error("a picture has the size " + size_text(given.width, given.height) +
                      "; pass one that is not empty");
  if (too_large(given.width, given.height))
    throw image_error("a picture of " + size_text(given.width, given.height) + " pixels is too large; scale it down");
  const int64_t row = given.width * 3, stride = given.stride == 0 ? row : given.stride;
  if (stride > kLargestStride)
    throw image_error("the stride of a picture is " + std::to_string(stride) + " bytes, and at most " +
                      std::to_string(kLargestStride) + " are taken");
  if (stride < row)
    throw image_error("the stride of a picture is " + std::to_string(stride) + " bytes, and a row of " +
                      std::to_string(given.width) + " pixels has " + std::to_string(row));
  Picture picture{given.width, given.height, std::vector<uint8_t>(static_cast<size_t>(row * given.height))};
  for (int64_t y = 0; y < given.height; ++y)
    std::memcpy(&picture.pixels[static_cast<size_t>(y * row)], given.data + y * stride, static_cast<size_t>(row));
  return picture;
}

PictureSize framed_size(PictureSize size, int64_t height, int64_t width, ResizeMode mode) {
  if (mode == ResizeMode::stretch) return size;
  // The size that has the aspect ratio of the frames, and the height or the width of the picture.
  const bool wide = size.width * height > size.height * width;
  if (wide == (mode == ResizeMode::crop)) return {proportional(size.height, width, height), size.height};
  return {size.width, proportional(size.width, height, width)};
}

void check_framed(PictureSize size, int64_t height, int64_t width, ResizeMode mode) {
  const PictureSize framed = framed_size(size, height, width, mode);
  if (too_large(framed.width, framed.height))
    throw image_error("a picture of " + size_text(size.width, size.height) + " pixels would have " +
                      size_text(framed.width, framed.height) + " with bars; crop it, or use the resize_mode crop");
}

Picture framed(Picture picture, int64_t height, int64_t width, ResizeMode mode, std::array<uint8_t, 3> background) {
  const PictureSize size = framed_size({picture.width, picture.height}, height, width, mode);
  if (size.width == picture.width && size.height == picture.height) return picture;
  if (mode == ResizeMode::crop) return cropped(picture, size.width, size.height);
  return padded(picture, size.width, size.height, background);
}

void clip_pixels(const Picture &picture, int64_t size, const std::array<float, 3> &mean,
                 const std::array<float, 3> &deviation, float *values) {
  const std::vector<Window<float>> across = blurred_cubic(picture.width, size),
                                   down = blurred_cubic(picture.height, size);
  const auto n = static_cast<size_t>(size);
  std::vector<float> sums(3 * n * n, 0.0f), row(3 * n);
  const std::array<float, 256> fraction = fractions();
  const size_t stride = static_cast<size_t>(picture.width) * 3;
  size_t first = 0; // of the output rows that may need more
  for (int64_t y = 0; y < picture.height; ++y) {
    const uint8_t *pixels = &picture.pixels[static_cast<size_t>(y) * stride];
    for (size_t x = 0; x < n; ++x) {
      float sum[3] = {0, 0, 0};
      const uint8_t *pixel = pixels + across[x].start * 3;
      for (const float weight : across[x].weights)
        for (float &channel : sum) channel += weight * fraction[*pixel++];
      for (size_t c = 0; c < 3; ++c) row[c * n + x] = sum[c];
    }
    while (first < n && down[first].start + static_cast<int64_t>(down[first].weights.size()) <= y) ++first;
    for (size_t v = first; v < n && down[v].start <= y; ++v) {
      const auto tap = static_cast<size_t>(y - down[v].start);
      if (tap >= down[v].weights.size()) continue;
      const float weight = down[v].weights[tap];
      for (size_t c = 0; c < 3; ++c)
        for (size_t x = 0; x < n; ++x) sums[(c * n + v) * n + x] += weight * row[c * n + x];
    }
  }
  for (size_t c = 0; c < 3; ++c)
    for (size_t i = 0; i < n * n; ++i) values[c * n * n + i] = (sums[c * n * n + i] - mean[c]) / deviation[c];
}

void vae_image(const Picture &picture, int64_t height, int64_t width, float *values) {
  const std::vector<uint8_t> across = lanczos_across(picture.pixels, picture.height, picture.width, width);
  const std::vector<uint8_t> pixels = lanczos_down(across, picture.height, width, height);
  const std::array<float, 256> fraction = fractions();
  const auto area = static_cast<size_t>(height * width);
  for (size_t i = 0; i < area; ++i)
    for (size_t c = 0; c < 3; ++c) values[c * area + i] = 2.0f * fraction[pixels[3 * i + c]] - 1.0f;
}

} // namespace svd_trt::detail
