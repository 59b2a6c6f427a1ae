// A bundle on disk, opened and checked.
#pragma once

#include <filesystem>
#include <string>

#include "manifest.hpp"

namespace svd_trt::detail {

struct Bundle {
  std::filesystem::path path;
  std::string text; // of manifest.json
  Manifest manifest;

  std::filesystem::path graph(const std::string &network) const;
};

// Reads the manifest and checks that every file is there, complete and, with `verify`, unaltered.
// Throws Failure (bundle).
Bundle open_bundle(const std::filesystem::path &path, bool verify);

// The whole file. Throws Failure (bundle).
std::string read_file(const std::filesystem::path &path);

} // namespace svd_trt::detail
