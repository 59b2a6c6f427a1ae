// Two pipelines at work in two threads, and a third thread that cancels; also closing from other threads.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

#include "bundle.hpp"

using namespace svd_trt;

namespace {

// Whether the videos of a pipeline may be cancelled now.
class Permission {
public:
  void set(bool value) {
    const std::lock_guard<std::mutex> lock(mutex_);
    may_ = value;
  }
  // Under the lock, so that it does not hit the video that comes after.
  void cancel(Pipeline &pipeline) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (may_) pipeline.cancel();
  }

private:
  std::mutex mutex_;
  bool may_ = false;
};

// Makes `videos` videos that may be cancelled, and one that may not before each. Returns how many were.
int make_videos(Pipeline &pipeline, const TestPicture &picture, int videos, const std::vector<uint8_t> &wanted,
                Permission &may_cancel) {
  int cancelled = 0;
  for (int i = 0; i < 2 * videos; ++i) {
    const bool may = i % 2 == 1;
    Stream stream = pipeline.stream(picture.view(), quick_arguments());
    may_cancel.set(may);
    try {
      const std::vector<uint8_t> frames = all_frames(stream);
      CHECK(frames == wanted);
    } catch (const Cancelled &) {
      CHECK_MESSAGE(may, "a video was cancelled, and nobody asked for that");
      ++cancelled;
    }
    may_cancel.set(false);
  }
  return cancelled;
}

} // namespace

TEST_CASE("two pipelines in two threads, and a thread that cancels") {
  Pipeline first(bundle_path(), one_thread()), second(bundle_path(), one_thread());
  const TestPicture picture = make_picture(64, 64);
  Stream reference = first.stream(picture.view(), quick_arguments());
  const std::vector<uint8_t> wanted = all_frames(reference);
  std::atomic<bool> finished{false};
  Permission may_cancel_first, may_cancel_second;
  std::thread canceller([&] {
    for (int i = 0; !finished; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1 + i % 10)); // at different moments of a video
      may_cancel_first.cancel(first);
      may_cancel_second.cancel(second);
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
  Permission never[3];
  for (int i = 0; i < 3; ++i)
    threads.emplace_back([&, i] { CHECK(make_videos(pipeline, picture, 1, wanted, never[i]) == 0); });
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
  std::atomic<int64_t> at_cancel{-1}; // once it was cancelled
  std::thread canceller([&] {
    while (steps < 3) std::this_thread::yield();
    stream.cancel();
    at_cancel = steps.load();
  });
  Frame frame{};
  CHECK_THROWS_WITH_AS(stream.next(frame), "the stream was cancelled", Cancelled);
  canceller.join();
  CHECK(steps <= at_cancel + 1); // the one that was being reported
  CHECK_THROWS_AS(stream.next(frame), Cancelled);
  MESSAGE("cancelled at step ", at_cancel.load(), ", ended at step ", steps.load());
}

TEST_CASE("no callback is called after the stream was closed") {
  const TestPicture test = make_picture(8, 8);
  const svd_trt_picture picture{sizeof picture, test.pixels.data(), test.width, test.height, 0};
  svd_trt_pipeline *handle = nullptr;
  REQUIRE(svd_trt_pipeline_open(bundle_path().c_str(), nullptr, &handle) == SVD_TRT_OK);
  svd_trt_arguments arguments;
  REQUIRE(svd_trt_arguments_init(handle, &arguments, sizeof arguments) == SVD_TRT_OK);
  arguments.num_videos_per_prompt = 1000; // their noise takes longer than the thread sleeps
  const std::vector<svd_trt_picture> pictures(4, picture);
  std::atomic<bool> closed{false};
  std::atomic<int> late{0};
  struct User {
    std::atomic<bool> &closed;
    std::atomic<int> &late;
  } user{closed, late};
  svd_trt_stream_options options;
  REQUIRE(svd_trt_stream_options_init(&options, sizeof options) == SVD_TRT_OK);
  options.user = &user;
  options.progress = [](void *given, const char *, int64_t, int64_t) -> int32_t {
    auto *seen = static_cast<User *>(given);
    if (seen->closed) ++seen->late;
    return 0;
  };
  svd_trt_stream *stream = nullptr;
  REQUIRE(svd_trt_stream_open(handle, pictures.data(), pictures.size(), &arguments, &options, &stream) == SVD_TRT_OK);
  std::thread closer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK(svd_trt_stream_close(stream) == SVD_TRT_OK);
    closed = true;
  });
  svd_trt_frame frame{};
  frame.size = sizeof frame;
  const svd_trt_status status = svd_trt_stream_next(stream, &frame);
  CHECK((status == SVD_TRT_CANCELLED || status == SVD_TRT_HANDLE_ERROR)); // or it was closed before
  closer.join();
  CHECK(late == 0);
  CHECK(svd_trt_pipeline_close(handle) == SVD_TRT_OK);
}

TEST_CASE("exceptions of callbacks come out of the call that waits, also with two threads") {
  Pipeline pipeline(bundle_path(), one_thread());
  const TestPicture picture = make_picture(64, 64);
  StreamOptions options;
  options.progress = [](const std::string &stage, int64_t, int64_t) {
    if (stage == "denoise") throw std::out_of_range("enough");
  };
  for (int i = 0; i < 5; ++i) {
    Stream stream = pipeline.stream(picture.view(), quick_arguments(), options);
    std::atomic<int> thrown{0}, cancelled{0};
    const auto take = [&] {
      Frame frame{};
      try {
        stream.next(frame);
      } catch (const std::out_of_range &) {
        ++thrown;
      } catch (const Cancelled &) {
        ++cancelled;
      }
    };
    std::thread other(take);
    take();
    other.join();
    CHECK(thrown == 1);
    CHECK(cancelled == 1);
  }
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
