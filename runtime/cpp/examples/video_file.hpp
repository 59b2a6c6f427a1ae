// Reading PPM pictures, and writing frames to a file or to standard output.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "svd_trt.hpp"

struct PpmPicture {
  int64_t width, height;
  std::vector<uint8_t> pixels;
  svd_trt::Picture view() const { return {pixels.data(), width, height}; }
};

// Throws std::runtime_error.
PpmPicture read_ppm(const std::string &path);

// Frames a second, as a fraction.
struct FrameRate {
  int64_t numerator, denominator;
};

// Frames of one video. The file has its final name only when it is complete.
class VideoFile {
public:
  // `path` may be "-" for standard output. Throws std::runtime_error, also in the functions below.
  VideoFile(std::string path, bool y4m, int64_t width, int64_t height, FrameRate rate);
  ~VideoFile(); // removes what is not complete
  VideoFile(const VideoFile &) = delete;
  VideoFile &operator=(const VideoFile &) = delete;

  void write(const svd_trt::Frame &frame);
  void finish();

private:
  void put(const void *data, size_t size);
  const std::string path_, partial_;
  const bool y4m_;
  std::FILE *file_;
  std::vector<uint8_t> planes_;
};
