// Failures that a caller can correct. The message is one line: what happened, then what to do.
#pragma once

#include <stdexcept>
#include <string>

#include "svd_trt.h"

namespace svd_trt::detail {

class Failure : public std::runtime_error {
public:
  Failure(svd_trt_status code, const std::string &message) : std::runtime_error(message), status(code) {}
  const svd_trt_status status;
};

inline Failure argument_error(const std::string &message) { return {SVD_TRT_ARGUMENT_ERROR, message}; }
inline Failure bundle_error(const std::string &message) { return {SVD_TRT_BUNDLE_ERROR, message}; }
inline Failure backend_error(const std::string &message) { return {SVD_TRT_BACKEND_ERROR, message}; }
inline Failure image_error(const std::string &message) { return {SVD_TRT_IMAGE_ERROR, message}; }

} // namespace svd_trt::detail
