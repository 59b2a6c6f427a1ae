// Memory does not grow over 200 videos of one pipeline, nor over 20 pipelines.
#include <doctest/doctest.h>

#include <fstream>
#include <string>

#include "bundle.hpp"

using namespace svd_trt;

namespace {

// Resident memory of this process in bytes.
int64_t resident() {
  std::ifstream file("/proc/self/statm");
  int64_t pages = 0;
  file >> pages >> pages;
  return pages * 4096;
}

} // namespace

TEST_CASE("200 videos") {
  Pipeline pipeline(bundle_path(), one_thread());
  const TestPicture picture = make_picture(200, 100);
  Arguments arguments = quick_arguments();
  int64_t warm = 0, peak = 0;
  for (int i = 0; i < 200; ++i) {
    arguments.seed = static_cast<uint64_t>(i);
    arguments.num_frames = 2 + i % 3;
    Stream stream = pipeline.stream(picture.view(), arguments);
    if (i % 10 == 9) { // some are given up
      Frame frame{};
      stream.next(frame);
    } else {
      all_frames(stream);
    }
    if (i == 20) warm = resident();
    peak = std::max(peak, resident());
  }
  MESSAGE("after 20 videos ", warm / 1000000, " MB, at most ", peak / 1000000, " MB in 200");
  CHECK(peak - warm < 8 << 20);
}

TEST_CASE("20 pipelines") {
  const TestPicture picture = make_picture(64, 64);
  int64_t warm = 0;
  for (int i = 0; i < 20; ++i) {
    Pipeline pipeline(bundle_path(), one_thread());
    Stream stream = pipeline.stream(picture.view(), quick_arguments());
    all_frames(stream);
    if (i == 5) warm = resident();
  }
  MESSAGE("after 5 pipelines ", warm / 1000000, " MB, after 20 ", resident() / 1000000, " MB");
  CHECK(resident() - warm < 16 << 20);
}
