#include "schedule.hpp"

#include <algorithm>
#include <cmath>
#include <functional>

#include "error.hpp"
#include "text.hpp"

namespace svd_trt::detail {

namespace {

constexpr size_t kStepsForAFullLastStep = 15; // of DPM-Solver++; with fewer, the last one is Euler's

// The table's value at `index`, between two of its values if need be.
double interpolated(const std::vector<double> &table, double index) {
  const double at = std::clamp(index, 0.0, static_cast<double>(table.size() - 1));
  const auto below = static_cast<size_t>(at);
  if (below + 1 == table.size()) return table.back();
  return table[below] + (at - static_cast<double>(below)) * (table[below + 1] - table[below]);
}

// `steps` of the levels of training, the highest first.
std::vector<double> spaced_sigmas(const Sampler &sampler, int64_t steps) {
  const auto levels = static_cast<int64_t>(sampler.training_sigmas.size());
  if (steps > levels)
    throw argument_error("num_inference_steps must be at most " + std::to_string(levels) +
                         ", the levels of the checkpoint's noise schedule, not " + std::to_string(steps));
  std::vector<double> sigmas;
  const int64_t spacing = levels / steps;
  const auto n = static_cast<double>(levels), s = static_cast<double>(steps);
  for (int64_t i = 0; i < steps; ++i) {
    double index = 0;
    if (sampler.timestep_spacing == "leading")
      index = static_cast<double>((steps - 1 - i) * spacing + sampler.steps_offset);
    else if (sampler.timestep_spacing == "trailing")
      index = std::nearbyint(n - static_cast<double>(i) * (n / s)) - 1;
    else if (steps > 1)
      index = static_cast<float>(static_cast<double>(steps - 1 - i) * ((n - 1) / (s - 1)));
    sigmas.push_back(interpolated(sampler.training_sigmas, index));
  }
  return sigmas;
}

// `count` numbers from `first` to `last`.
std::vector<double> line(double first, double last, int64_t count) {
  std::vector<double> numbers;
  for (int64_t i = 0; i < count; ++i) {
    const double t = count == 1 ? 0.0 : static_cast<double>(i) / static_cast<double>(count - 1);
    numbers.push_back(first + t * (last - first));
  }
  return numbers;
}

// Align Your Steps for SVD (arXiv:2404.14507): ten published steps, other counts by their logarithms.
std::vector<float> ays_sigmas(int64_t steps) {
  std::vector<double> levels{700, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002};
  for (double &level : levels) level = std::log(level);
  const double last = static_cast<double>(levels.size() - 1);
  std::vector<float> sigmas;
  for (int64_t i = 0; i < steps; ++i)
    sigmas.push_back(static_cast<float>(
        std::exp(interpolated(levels, static_cast<double>(i) * (last / static_cast<double>(steps))))));
  sigmas.push_back(0);
  return sigmas;
}

// What `solver` adds to Euler's step from `now` to `next`, as a weight of the change of the denoised latents since the
// level `before`. 0 where there is no line through two levels.
double second_order(const std::string &solver, double before, double now, double next, bool last_of_few) {
  if (before == now) return 0;
  const double width = std::log(before / now);
  if (solver == "unic") return next / now * (1 + std::expm1(-width) / width);
  if (next == 0) return 0;
  if (solver == "dpmpp-2m") return last_of_few ? 0 : (1 - next / now) * std::log(now / next) / (2 * width);
  if (solver == "ab2") return (now - next - next * std::log(now / next)) / (before - now);
  return 0;
}

} // namespace

std::vector<float> checkpoint_sigmas(const Sampler &sampler, int64_t steps) {
  std::vector<double> sigmas;
  if (!sampler.training_sigmas.empty()) sigmas = spaced_sigmas(sampler, steps);
  if (sampler.schedule != "training") {
    const double low = sampler.sigma_min ? *sampler.sigma_min : sigmas.back();
    const double high = sampler.sigma_max ? *sampler.sigma_max : sigmas.front();
    if (sampler.schedule == "karras") {
      sigmas = line(std::pow(high, 1 / sampler.rho), std::pow(low, 1 / sampler.rho), steps);
      for (double &sigma : sigmas) sigma = std::pow(sigma, sampler.rho);
    } else {
      sigmas = line(std::log(high), std::log(low), steps);
      for (double &sigma : sigmas) sigma = std::exp(sigma);
    }
  }
  sigmas.push_back(sampler.final_sigma ? *sampler.final_sigma : sigmas.back());
  return {sigmas.begin(), sigmas.end()};
}

std::vector<float> named_sigmas(const std::string &schedule, const Sampler &sampler, int64_t steps) {
  if (schedule == "ays") return ays_sigmas(steps);
  Sampler named = sampler;
  if (!schedule.empty()) named.schedule = schedule;
  return checkpoint_sigmas(named, steps);
}

std::vector<float> lcm_sigmas(int64_t steps) {
  constexpr int64_t levels = 40;
  if (steps > levels)
    throw argument_error("num_inference_steps must be at most " + std::to_string(levels) +
                         " with the sampler lcm, not " + std::to_string(steps) + "; a few-step UNet needs 1 to 8");
  const std::vector<double> roots = line(std::pow(700.0, 1 / 7.0), std::pow(0.002, 1 / 7.0), levels);
  std::vector<float> sigmas;
  for (int64_t i = 0; i < steps; ++i)
    sigmas.push_back(static_cast<float>(std::pow(roots[static_cast<size_t>(i * (levels / steps))], 7.0)));
  sigmas.push_back(0);
  return sigmas;
}

std::vector<float> custom_sigmas(const double *values, size_t count) {
  constexpr double largest = 1e6;
  if (count < 2) throw argument_error("sigmas needs at least two numbers, such as 700, 10, 0");
  if (!std::all_of(values, values + count, [](double v) { return v <= largest; }) || values[count - 1] < 0)
    throw argument_error("sigmas must be between 0 and 1e+06 and decrease");
  std::vector<float> sigmas(values, values + count);
  if (std::adjacent_find(sigmas.begin(), sigmas.end(), std::less_equal<>()) != sigmas.end()) {
    std::string given;
    for (size_t i = 0; i < count; ++i) given += (i ? ", " : "") + to_text(values[i]);
    throw argument_error("sigmas must decrease, and " + shortened(given) + " do not");
  }
  return sigmas;
}

double initial_scale(const std::string &rule, const std::vector<float> &sigmas) {
  const float highest = *std::max_element(sigmas.begin(), sigmas.end());
  if (rule == "sigma") return highest;
  if (rule == "sqrt(sigma^2 + 1)") return std::sqrt(highest * highest + 1);
  throw bundle_error("the bundle scales its first noise by '" + rule +
                     "', which this library does not know; update it");
}

std::vector<Row> step_table(const std::string &solver, const std::vector<float> &sigmas) {
  std::vector<Row> table;
  const size_t steps = sigmas.size() - 1;
  for (size_t i = 0; i < steps; ++i) {
    const double sigma = sigmas[i], next = sigmas[i + 1], ratio = next / sigma, root = std::sqrt(sigma * sigma + 1);
    const bool last_of_few = i + 1 == steps && steps < kStepsForAFullLastStep;
    const double second = i == 0 ? 0 : second_order(solver, sigmas[i - 1], sigma, next, last_of_few);
    const bool fresh = solver == "lcm"; // the next latents are the denoised ones with noise of the next level
    const std::array<double, kCoefficients> row{
        1 / root,          0.25 * std::log(sigma),         1 / (root * root),     -sigma / root,
        fresh ? 0 : ratio, fresh ? 1 : 1 - ratio + second, fresh ? next : -second};
    Row rounded;
    std::transform(row.begin(), row.end(), rounded.begin(), [](double v) { return static_cast<float>(v); });
    table.push_back(rounded);
  }
  return table;
}

size_t noisy_steps(const std::string &solver, const std::vector<float> &sigmas) {
  if (solver != "lcm") return 0;
  return static_cast<size_t>(std::count_if(sigmas.begin() + 1, sigmas.end(), [](float sigma) { return sigma != 0; }));
}

} // namespace svd_trt::detail
