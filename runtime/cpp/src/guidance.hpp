// Classifier-free guidance: how strong it is in each frame, and which steps have it.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace svd_trt::detail {

// The scale of each frame, from those of the first and the last frame of the shape "linear".
std::vector<float> guidance_scales(const std::string &shape, double low, double high, int64_t frames);

// Whether each step has guidance: none if the video is not `guided`, else those from levels in the interval, which is
// open below and closed above (arXiv:2404.07724). Throws Failure (argument): it should have guidance, and no step has.
std::vector<bool> guided_steps(const std::vector<float> &sigmas, bool guided,
                               const std::optional<std::array<double, 2>> &interval);

// The caller's two noise levels. Throws Failure (argument).
std::array<double, 2> checked_interval(const double *values);

} // namespace svd_trt::detail
