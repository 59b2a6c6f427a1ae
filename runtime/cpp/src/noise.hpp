// Gaussian noise of `torch-cpu-mt19937`, see docs/bundle.md: the numbers of torch.Generator().manual_seed(seed).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <vector>

namespace svd_trt::detail {

class Generator {
public:
  // Only the low 32 bits of the seed count, as in torch.
  explicit Generator(uint64_t seed) : source_(static_cast<uint32_t>(seed)) {}

  // The next values of a standard normal distribution. With `half` they are those of a float16 tensor.
  std::vector<float> normal(size_t length, bool half);

private:
  float uniform() { return static_cast<float>(source_() & 0xffffff) * 0x1p-24f; }
  double uniform53();
  void block(float *values);
  double serial();

  std::mt19937 source_;
  std::optional<double> spare_;
};

// `rows` times `each` values, as diffusers' randn_tensor draws them: one source draws all at once, and of several, each
// draws its own row. There may be more sources than rows.
std::vector<float> draw_rows(std::vector<Generator> &sources, size_t rows, size_t each, bool half);

// Rounded to float16, to the nearest and to even.
float rounded_to_half(float value);

} // namespace svd_trt::detail
