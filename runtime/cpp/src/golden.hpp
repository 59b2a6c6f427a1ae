// The self-test: what this library gets, beside the golden values of a bundle.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "generation.hpp"

namespace svd_trt::detail {

// Called with each comparison: the largest difference, and the largest that is allowed.
using OnCheck = std::function<void(const std::string &name, double difference, double allowed)>;

// Throws Failure: the bundle has no golden values, or they are damaged.
void check_golden(const std::shared_ptr<const Shared> &shared, const OnCheck &on_check);

// The same with values that are given: the text of the golden values, their picture, and the bytes of their frames.
void compare_golden(const std::string &text, const Picture &picture, const std::string &frames,
                    const std::shared_ptr<const Shared> &shared, const OnCheck &on_check);

// A binary PPM (P6, 8 bits). Throws Failure (image).
Picture read_ppm(const std::string &bytes);

} // namespace svd_trt::detail
