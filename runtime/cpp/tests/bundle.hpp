// The bundle of the tests, and a picture.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "svd_trt.hpp"

// The environment variable SVD_TRT_TEST_BUNDLE; ends the process with 1 if it is not set.
std::string bundle_path();

// Networks of a few milliseconds are slower with several threads.
svd_trt::OpenOptions one_thread();

// Opened once, because loading the networks takes most of the time.
svd_trt::Pipeline &shared_pipeline();

struct TestPicture {
  int64_t width, height;
  std::vector<uint8_t> pixels;
  svd_trt::Picture view() const { return {pixels.data(), width, height}; }
};
TestPicture make_picture(int64_t width, int64_t height);

// Two steps of a short video.
svd_trt::Arguments quick_arguments();

// Every byte of every frame.
std::vector<uint8_t> all_frames(svd_trt::Stream &stream);
