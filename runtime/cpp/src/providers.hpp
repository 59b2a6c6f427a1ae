// ONNX Runtime's execution providers.
#pragma once

#include "networks.hpp"

namespace svd_trt::detail {

// Adds the provider of `options` to a session's options. Throws Failure (backend) if it is not there.
void append_provider(Ort::SessionOptions &session, const DeviceOptions &options, Environment &environment);

// Throws Failure (argument): the names and numbers make no sense.
void check_device(const DeviceOptions &options);

} // namespace svd_trt::detail
