#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include "bundle.hpp"

#include <cstdio>
#include <cstdlib>

std::string bundle_path() {
  const char *path = std::getenv("SVD_TRT_TEST_BUNDLE");
  if (path == nullptr) {
    std::fprintf(stderr, "set SVD_TRT_TEST_BUNDLE to a small bundle\n");
    std::exit(1);
  }
  return path;
}

svd_trt::OpenOptions one_thread() {
  svd_trt::OpenOptions options;
  options.threads = 1;
  return options;
}

svd_trt::Pipeline &shared_pipeline() {
  static svd_trt::Pipeline pipeline(bundle_path(), one_thread());
  return pipeline;
}

TestPicture make_picture(int64_t width, int64_t height) {
  TestPicture picture{width, height, {}};
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x)
      for (int64_t c = 0; c < 3; ++c)
        picture.pixels.push_back(static_cast<uint8_t>((x * 5 + y * 3 * c + x * y / 9) % 256));
  return picture;
}

svd_trt::Arguments quick_arguments() {
  svd_trt::Arguments arguments;
  arguments.num_inference_steps = 2;
  arguments.num_frames = 3;
  arguments.seed = 42;
  return arguments;
}

std::vector<uint8_t> all_frames(svd_trt::Stream &stream) {
  std::vector<uint8_t> bytes;
  for (const svd_trt::Frame &frame : stream)
    bytes.insert(bytes.end(), frame.data, frame.data + frame.height * frame.stride);
  return bytes;
}
