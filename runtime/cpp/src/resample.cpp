#include "resample.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace svd_trt::detail {
namespace {

constexpr double kCubic = -0.75;
constexpr double kLobes = 3.0;
constexpr double kPi = 3.14159265358979323846;
constexpr int kFractionBits = 22; // of weights in fixed point: 8 bits for the pixel, 2 for sums above it

double near_kernel(double x) { return ((kCubic + 2) * x - (kCubic + 3)) * x * x + 1; } // distances 0 to 1
double far_kernel(double x) { return ((kCubic * x - 5 * kCubic) * x + 8 * kCubic) * x - 4 * kCubic; } // 1 to 2

// Blurs before shrinking by `factor`.
std::vector<double> gaussian(double factor) {
  const double sigma = std::max((factor - 1.0) / 2.0, 0.001);
  const auto radius = static_cast<int64_t>(std::max(4.0 * sigma, 3.0)) / 2;
  std::vector<double> weights;
  double sum = 0;
  for (int64_t i = -radius; i <= radius; ++i) {
    weights.push_back(std::exp(-static_cast<double>(i * i) / (2.0 * sigma * sigma)));
    sum += weights.back();
  }
  for (double &weight : weights) weight /= sum;
  return weights;
}

// The index reflected at the ends without repeating them, as often as a short axis needs.
int64_t reflected(int64_t index, int64_t length) {
  const int64_t period = std::max<int64_t>(2 * (length - 1), 1);
  const int64_t folded = (index % period + period) % period;
  return std::min(folded, period - folded);
}

double sinc(double x) { return x == 0.0 ? 1.0 : std::sin(kPi * x) / (kPi * x); }
double lanczos(double x) { return std::fabs(x) < kLobes ? sinc(x) * sinc(x / kLobes) : 0.0; }

std::vector<Window<int32_t>> lanczos_windows(int64_t length, int64_t size) {
  const double scale = static_cast<double>(length) / static_cast<double>(size), stretch = std::max(scale, 1.0);
  const double support = kLobes * stretch, inverse = 1.0 / stretch;
  std::vector<Window<int32_t>> windows;
  for (int64_t i = 0; i < size; ++i) {
    const double center = (static_cast<double>(i) + 0.5) * scale;
    const int64_t start = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
    const int64_t end = std::min<int64_t>(static_cast<int64_t>(center + support + 0.5), length);
    std::vector<double> weights;
    double sum = 0;
    for (int64_t j = start; j < end; ++j) {
      weights.push_back(lanczos((static_cast<double>(j) - center + 0.5) * inverse));
      sum += weights.back();
    }
    Window<int32_t> window{start, {}};
    for (const double weight : weights)
      window.weights.push_back(static_cast<int32_t>(std::round(weight / sum * (1 << kFractionBits))));
    windows.push_back(std::move(window));
  }
  return windows;
}

uint8_t to_byte(int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> kFractionBits, 0, 255)); }

} // namespace

std::vector<Window<float>> blurred_cubic(int64_t length, int64_t size) {
  const std::vector<double> blur = gaussian(static_cast<double>(length) / static_cast<double>(size));
  const auto radius = static_cast<int64_t>(blur.size() / 2);
  // torch keeps positions in float32; their rounding changes the weights noticeably for wide pictures.
  const float step = size > 1 ? static_cast<float>(length - 1) / static_cast<float>(size - 1) : 0.0f;
  std::vector<Window<float>> windows;
  std::vector<double> line(static_cast<size_t>(length), 0.0);
  for (int64_t i = 0; i < size; ++i) {
    const float position = step * static_cast<float>(i);
    const int64_t start = std::min(static_cast<int64_t>(std::floor(position)), length - 1);
    const double t = std::clamp(static_cast<double>(position) - static_cast<double>(start), 0.0, 1.0);
    const double taps[4] = {far_kernel(t + 1), near_kernel(t), near_kernel(1 - t), far_kernel(2 - t)};
    int64_t low = length, high = -1;
    for (int64_t tap = 0; tap < 4; ++tap) {
      const int64_t middle = std::clamp<int64_t>(start + tap - 1, 0, length - 1);
      for (int64_t offset = -radius; offset <= radius; ++offset) {
        const int64_t source = reflected(middle + offset, length);
        line[static_cast<size_t>(source)] += taps[tap] * blur[static_cast<size_t>(offset + radius)];
        low = std::min(low, source), high = std::max(high, source);
      }
    }
    Window<float> window{low, {}};
    for (int64_t source = low; source <= high; ++source) {
      window.weights.push_back(static_cast<float>(line[static_cast<size_t>(source)]));
      line[static_cast<size_t>(source)] = 0.0;
    }
    windows.push_back(std::move(window));
  }
  return windows;
}

std::vector<uint8_t> lanczos_across(const std::vector<uint8_t> &pixels, int64_t height, int64_t width, int64_t size) {
  if (size == width) return pixels;
  const std::vector<Window<int32_t>> windows = lanczos_windows(width, size);
  std::vector<uint8_t> resized(static_cast<size_t>(height * size * 3));
  uint8_t *out = resized.data();
  for (int64_t y = 0; y < height; ++y) {
    const uint8_t *row = &pixels[static_cast<size_t>(y * width * 3)];
    for (const Window<int32_t> &window : windows) {
      int32_t sum[3] = {1 << (kFractionBits - 1), 1 << (kFractionBits - 1), 1 << (kFractionBits - 1)};
      const uint8_t *pixel = row + window.start * 3;
      for (const int32_t weight : window.weights)
        for (int32_t &channel : sum) channel += weight * *pixel++;
      for (const int32_t channel : sum) *out++ = to_byte(channel);
    }
  }
  return resized;
}

std::vector<uint8_t> lanczos_down(const std::vector<uint8_t> &pixels, int64_t height, int64_t width, int64_t size) {
  if (size == height) return pixels;
  const std::vector<Window<int32_t>> windows = lanczos_windows(height, size);
  const auto row = static_cast<size_t>(width * 3);
  std::vector<uint8_t> resized(static_cast<size_t>(size) * row);
  std::vector<int32_t> sums(row);
  uint8_t *out = resized.data();
  for (const Window<int32_t> &window : windows) {
    std::fill(sums.begin(), sums.end(), 1 << (kFractionBits - 1));
    const uint8_t *line = &pixels[static_cast<size_t>(window.start) * row];
    for (const int32_t weight : window.weights)
      for (int32_t &sum : sums) sum += weight * *line++;
    for (const int32_t sum : sums) *out++ = to_byte(sum);
  }
  return resized;
}

} // namespace svd_trt::detail
