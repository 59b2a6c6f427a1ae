// The command line of svd_trt_cli. Option names and meanings are those of `svd-trt infer`.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "svd_trt.hpp"
#include "video_file.hpp"

struct CliOptions {
  std::string bundle;
  std::vector<std::string> pictures;
  std::string output;
  std::string format; // "raw" or "y4m"
  std::optional<FrameRate> output_fps;
  bool self_test = false, quiet = false, help = false, version = false;
  svd_trt::OpenOptions open;
  svd_trt::Arguments arguments;
};

class UsageError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws UsageError.
CliOptions parse_command_line(const std::vector<std::string> &arguments);

// How many videos the options ask for, as far as the library would take their number.
int64_t videos_of(const CliOptions &options);

extern const char *const kUsage;
