// ONNX Runtime's header, and what the library needs around it.
#pragma once

// Not before main: a host may load the library without using it, and a failure must be an error and not a crash.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

namespace svd_trt::detail {

// Values of a tensor. Throws std::bad_alloc if no memory could hold them.
inline size_t elements(const std::vector<int64_t> &shape) {
  size_t count = 1;
  for (const int64_t size : shape) {
    if (size < 0 || (size != 0 && count > PTRDIFF_MAX / static_cast<size_t>(size))) throw std::bad_alloc();
    count *= static_cast<size_t>(size);
  }
  return count;
}

// ONNX Runtime's environment, and what is registered in it and goes with it.
struct Environment {
  Ort::Env env{ORT_LOGGING_LEVEL_ERROR, "svd_trt"};
  std::mutex mutex;
  std::string plugin; // file of the provider's library that is registered; empty: none
};

// One for all pipelines; it ends with the last. Throws Failure (backend) if the library is older than its headers.
std::shared_ptr<Environment> environment();

// A tensor over the caller's memory.
Ort::Value view(float *data, const std::vector<int64_t> &shape);
Ort::Value view(uint8_t *data, const std::vector<int64_t> &shape);

} // namespace svd_trt::detail
