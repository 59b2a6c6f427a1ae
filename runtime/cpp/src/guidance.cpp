#include "guidance.hpp"

#include <algorithm>
#include <cmath>

#include "error.hpp"
#include "text.hpp"

namespace svd_trt::detail {

std::vector<float> guidance_scales(const std::string &shape, double low, double high, int64_t frames) {
  std::vector<float> scales;
  for (int64_t f = 0; f < frames; ++f) {
    double t = frames == 1 ? 0.0 : static_cast<double>(f) / static_cast<double>(frames - 1);
    if (shape == "constant") t = 1;
    if (shape == "triangular") t = 1 - std::abs(2 * t - 1);
    scales.push_back(static_cast<float>(low + t * (high - low)));
  }
  return scales;
}

std::vector<bool> guided_steps(const std::vector<float> &sigmas, bool guided,
                               const std::optional<std::array<double, 2>> &interval) {
  const size_t steps = sigmas.size() - 1;
  std::vector<bool> found(steps, guided);
  if (!guided || !interval) return found;
  const auto low = static_cast<float>((*interval)[0]), high = static_cast<float>((*interval)[1]); // as the levels are
  for (size_t i = 0; i < steps; ++i) found[i] = low < sigmas[i] && sigmas[i] <= high;
  if (std::find(found.begin(), found.end(), true) == found.end())
    throw argument_error("no step has a noise level above " + to_text((*interval)[0]) + " and up to " +
                         to_text((*interval)[1]) + ", so there would be no guidance; the steps start at levels from " +
                         to_text(sigmas.front()) + " down to " + to_text(sigmas[steps - 1]) +
                         ": give a guidance_interval with some of them");
  return found;
}

std::array<double, 2> checked_interval(const double *values) {
  constexpr double largest = 1e6;
  if (!(0 <= values[0] && values[0] < values[1] && values[1] <= largest))
    throw argument_error("guidance_interval must be two noise levels from 0 to 1e+06, the lower one first, such as "
                         "0,50, not " +
                         to_text(values[0]) + ", " + to_text(values[1]));
  return {values[0], values[1]};
}

} // namespace svd_trt::detail
