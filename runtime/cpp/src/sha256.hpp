// SHA-256 (FIPS 180-4). The library's own, because it is short, and because a program that embeds the library would
// otherwise have to agree with it on a version of OpenSSL.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace svd_trt::detail {

class Sha256 {
public:
  void update(const void *data, size_t size);
  // Lower-case hex. The object must not be used afterwards.
  std::string hex();

private:
  void block(const uint8_t *data);

  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<uint8_t, 64> rest_{};
  uint64_t size_ = 0;
};

std::string sha256_of(const std::string &text);

// Throws std::system_error if the file cannot be read.
std::string sha256_of_file(const std::filesystem::path &path);

} // namespace svd_trt::detail
