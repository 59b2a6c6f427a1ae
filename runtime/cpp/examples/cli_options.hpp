// The command line of svd_trt_cli. Option names and meanings are those of `svd-trt infer`.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "svd_trt.hpp"

struct CliOptions {
  std::string bundle;
  std::vector<std::string> pictures;
  std::string output;
  std::string format; // "raw" or "y4m"
  bool self_test = false, quiet = false, help = false, version = false;
  svd_trt::OpenOptions open;
  svd_trt::Arguments arguments;
};

class UsageError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws UsageError.
CliOptions parse_command_line(const std::vector<std::string> &arguments);

extern const char *const kUsage;
