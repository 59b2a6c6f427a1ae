#include "noise.hpp"

#include <algorithm>
#include <cmath>

namespace svd_trt::detail {
namespace {

constexpr size_t kBlock = 16;
constexpr double kTwoPi = 6.283185307179586476925286766559;

} // namespace

std::vector<float> Generator::normal(size_t length, bool half) {
  std::vector<float> values(length);
  if (length < kBlock) {
    for (float &value : values) value = static_cast<float>(serial());
  } else {
    const size_t rest = length % kBlock;
    for (size_t i = 0; i + kBlock <= length; i += kBlock) block(&values[i]);
    if (rest != 0) {
      // torch fills a float32 tensor with uniforms to its end before it overwrites the last 16.
      if (!half) source_.discard(rest);
      block(&values[length - kBlock]);
    }
  }
  if (half)
    for (float &value : values) value = rounded_to_half(value);
  return values;
}

// Box and Muller's method, rounded to float32 where torch does it.
void Generator::block(float *values) {
  float uniforms[kBlock];
  for (float &value : uniforms) value = uniform();
  for (size_t i = 0; i < kBlock / 2; ++i) {
    const float radius = std::sqrt(-2.0f * static_cast<float>(std::log(1.0 - static_cast<double>(uniforms[i]))));
    const float angle = static_cast<float>(kTwoPi) * uniforms[i + kBlock / 2];
    values[i] = radius * std::cos(angle) + 0.0f; // -0 becomes 0, as when torch adds the mean
    values[i + kBlock / 2] = radius * std::sin(angle) + 0.0f;
  }
}

double Generator::uniform53() {
  const uint64_t high = source_();
  return static_cast<double>((high << 32 | source_()) & ((uint64_t{1} << 53) - 1)) * 0x1p-53;
}

double Generator::serial() {
  if (spare_) {
    const double value = *spare_;
    spare_.reset();
    return value;
  }
  const double angle = kTwoPi * uniform53();
  const double radius = std::sqrt(-2.0 * std::log1p(-uniform53()));
  spare_ = radius * std::sin(angle);
  return radius * std::cos(angle);
}

std::vector<float> draw_rows(std::vector<Generator> &sources, size_t rows, size_t each, bool half) {
  if (sources.size() == 1) return sources[0].normal(rows * each, half);
  std::vector<float> values;
  for (size_t i = 0; i < rows; ++i) {
    const std::vector<float> row = sources.at(i).normal(each, half);
    values.insert(values.end(), row.begin(), row.end());
  }
  return values;
}

float rounded_to_half(float value) {
  const float magnitude = std::fabs(value);
  if (!(magnitude < 65520.0f)) return std::isnan(value) ? value : std::copysign(INFINITY, value);
  // The distance of neighbouring float16 values is 2^-10 of the power of two below, and at least 2^-24.
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const float step = std::ldexp(1.0f, std::max(exponent - 11, -24));
  return std::nearbyint(value / step) * step;
}

} // namespace svd_trt::detail
