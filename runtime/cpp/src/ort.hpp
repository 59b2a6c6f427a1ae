// ONNX Runtime's header, and what the library needs around it.
#pragma once

// Not before main: a host may load the library without using it, and a failure must be an error and not a crash.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <cstdint>
#include <memory>
#include <vector>

namespace svd_trt::detail {

inline size_t elements(const std::vector<int64_t> &shape) {
  size_t count = 1;
  for (const int64_t size : shape) count *= static_cast<size_t>(size);
  return count;
}

// ONNX Runtime's environment, one for all pipelines. Throws Failure (backend) if the library is older than its headers.
std::shared_ptr<Ort::Env> environment();

// A tensor over the caller's memory.
Ort::Value view(float *data, const std::vector<int64_t> &shape);
Ort::Value view(uint8_t *data, const std::vector<int64_t> &shape);

} // namespace svd_trt::detail
