// Two pipelines at work in two threads, and a third thread that cancels; also closing from other threads.
#include <doctest/doctest.h>

#include <atomic>
#include <thread>

#include "bundle.hpp"

using namespace svd_trt;

namespace {

// Makes `videos` videos, and before each one says whether it may be cancelled: every second one. Returns how many were.
int make_videos(Pipeline &pipeline, const TestPicture &picture, int videos, const std::vector<uint8_t> &wanted,
                std::atomic<bool> &may_cancel) {
  int cancelled = 0;
  for (int i = 0; i < 2 * videos; ++i) {
    Stream stream = pipeline.stream(picture.view(), quick_arguments());
    may_cancel = i % 2 == 1;
    try {
      const std::vector<uint8_t> frames = all_frames(stream);
      CHECK(frames == wanted);
    } catch (const Cancelled &) {
      ++cancelled;
    }
    may_cancel = false;
  }
  return cancelled;
}

} // namespace

TEST_CASE("two pipelines in two threads, and a thread that cancels") {
  Pipeline first(bundle_path(), one_thread()), second(bundle_path(), one_thread());
  const TestPicture picture = make_picture(64, 64);
  Stream reference = first.stream(picture.view(), quick_arguments());
  const std::vector<uint8_t> wanted = all_frames(reference);
  std::atomic<bool> finished{false}, may_cancel_first{false}, may_cancel_second{false};
  std::thread canceller([&] {
    for (int i = 0; !finished; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1 + i % 10)); // at different moments of a video
      if (may_cancel_first) first.cancel();
      if (may_cancel_second) second.cancel();
    }
  });
  std::atomic<int> cancelled{0};
  std::thread other([&] { cancelled += make_videos(second, picture, 8, wanted, may_cancel_second); });
  cancelled += make_videos(first, picture, 8, wanted, may_cancel_first);
  other.join();
  finished = true;
  canceller.join();
  MESSAGE(cancelled.load(), " of 16 videos that might be were cancelled");
  CHECK(cancelled > 0);
}

TEST_CASE("streams of one pipeline run in several threads") {
  Pipeline pipeline(bundle_path(), one_thread());
  const TestPicture picture = make_picture(64, 64);
  Stream reference = pipeline.stream(picture.view(), quick_arguments());
  const std::vector<uint8_t> wanted = all_frames(reference);
  std::vector<std::thread> threads;
  std::atomic<bool> ignored{false};
  for (int i = 0; i < 3; ++i)
    threads.emplace_back([&] { CHECK(make_videos(pipeline, picture, 1, wanted, ignored) == 0); });
  for (std::thread &thread : threads) thread.join();
}

TEST_CASE("a stream that is cancelled from another thread ends within a step") {
  Pipeline pipeline(bundle_path(), one_thread());
  const TestPicture picture = make_picture(64, 64);
  Arguments arguments = quick_arguments();
  arguments.num_inference_steps = 1000;
  StreamOptions options;
  std::atomic<int64_t> steps{0};
  options.progress = [&](const std::string &stage, int64_t done, int64_t) {
    if (stage == "denoise") steps = done;
  };
  Stream stream = pipeline.stream(picture.view(), arguments, options);
  std::atomic<int64_t> at_cancel{-1};
  std::thread canceller([&] {
    while (steps < 3) std::this_thread::yield();
    at_cancel = steps.load();
    stream.cancel();
  });
  Frame frame{};
  CHECK_THROWS_WITH_AS(stream.next(frame), "the stream was cancelled", Cancelled);
  canceller.join();
  CHECK(steps < 1000);
  CHECK_THROWS_AS(stream.next(frame), Cancelled);
  MESSAGE("cancelled at step ", at_cancel.load(), ", ended at step ", steps.load());
}

TEST_CASE("closing a pipeline or a stream while another thread waits for a frame") {
  const TestPicture picture = make_picture(64, 64);
  const svd_trt_picture view{sizeof view, picture.pixels.data(), picture.width, picture.height, 0};
  for (const bool whole_pipeline : {true, false}) {
    svd_trt_pipeline *pipeline = nullptr;
    svd_trt_stream *stream = nullptr;
    svd_trt_arguments arguments;
    std::atomic<bool> started{false};
    REQUIRE(svd_trt_pipeline_open(bundle_path().c_str(), nullptr, &pipeline) == SVD_TRT_OK);
    REQUIRE(svd_trt_arguments_init(pipeline, &arguments, sizeof arguments) == SVD_TRT_OK);
    arguments.num_inference_steps = 1000;
    svd_trt_stream_options options;
    svd_trt_stream_options_init(&options, sizeof options);
    options.user = &started;
    options.progress = [](void *user, const char *, int64_t, int64_t) -> int32_t {
      *static_cast<std::atomic<bool> *>(user) = true;
      return 0;
    };
    REQUIRE(svd_trt_stream_open(pipeline, &view, 1, &arguments, &options, &stream) == SVD_TRT_OK);
    std::thread closer([&] {
      while (!started) std::this_thread::yield();
      CHECK((whole_pipeline ? svd_trt_pipeline_close(pipeline) : svd_trt_stream_close(stream)) == SVD_TRT_OK);
    });
    svd_trt_frame frame{};
    frame.size = sizeof frame;
    CHECK(svd_trt_stream_next(stream, &frame) == SVD_TRT_CANCELLED);
    CHECK(std::string(svd_trt_last_error()) == (whole_pipeline ? "the pipeline was closed" : "the stream was closed"));
    closer.join();
    CHECK((whole_pipeline ? svd_trt_stream_close(stream) : svd_trt_pipeline_close(pipeline)) == SVD_TRT_OK);
  }
}
