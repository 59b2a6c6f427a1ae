// Noise levels and the table of coefficients, see docs/bundle.md. Notation follows Karras et al. 2022
// (arXiv:2206.00364).
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "manifest.hpp"

namespace svd_trt::detail {

constexpr size_t kCoefficients = 7;
constexpr size_t kSkip = 2; // index of c_skip
using Row = std::array<float, kCoefficients>;

// steps + 1 levels of the checkpoint's schedule. Throws Failure (argument) if it has fewer levels of training.
std::vector<float> checkpoint_sigmas(const Sampler &sampler, int64_t steps);

// The levels of the schedule "karras", "exponential" or "ays"; empty is the checkpoint's own. Throws as above.
std::vector<float> named_sigmas(const std::string &schedule, const Sampler &sampler, int64_t steps);

// steps + 1 levels of AnimateLCM-SVD's scheduler. Throws Failure (argument) if it has fewer.
std::vector<float> lcm_sigmas(int64_t steps);

// The caller's levels, checked. Throws Failure (argument).
std::vector<float> custom_sigmas(const double *values, size_t count);

// Factor of the first latents. Throws Failure (bundle) if the bundle names another rule.
double initial_scale(const std::string &rule, const std::vector<float> &sigmas);

// A row for each step of `solver`: "euler", "unic", "dpmpp-2m", "ab2" or "lcm".
std::vector<Row> step_table(const std::string &solver, const std::vector<float> &sigmas);

// Of how many steps, the first ones, `solver` takes fresh noise in the place of the previous denoised latents.
size_t noisy_steps(const std::string &solver, const std::vector<float> &sigmas);

} // namespace svd_trt::detail
