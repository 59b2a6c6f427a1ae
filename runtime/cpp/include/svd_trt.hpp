// C++17 interface of svd-trt, a thin layer over svd_trt.h without code of its own in the library.
//
//   svd_trt::Pipeline pipeline("svd-xt");
//   svd_trt::Arguments arguments;
//   arguments.seed = 42;
//   svd_trt::Stream stream = pipeline.stream({pixels, width, height}, arguments);
//   for (const svd_trt::Frame &frame : stream) write(frame.data, frame.width, frame.height);
//
// Failures are exceptions of type svd_trt::Error, and svd_trt::Cancelled if a stream was cancelled. An exception that
// a callback throws ends the stream, and the call that was waiting throws it again.
#ifndef SVD_TRT_HPP
#define SVD_TRT_HPP

#include <array>
#include <cstdint>
#include <exception>
#include <functional>
#include <iterator>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "svd_trt.h"

namespace svd_trt {

class Error : public std::runtime_error {
public:
  Error(svd_trt_status status, const std::string &message) : std::runtime_error(message), status_(status) {}
  svd_trt_status status() const noexcept { return status_; }

private:
  svd_trt_status status_;
};

class Cancelled : public Error {
public:
  using Error::Error;
};

namespace detail {

inline void require(svd_trt_status status) {
  if (status == SVD_TRT_CANCELLED) throw Cancelled(status, svd_trt_last_error());
  if (status < 0) throw Error(status, svd_trt_last_error());
}

} // namespace detail

struct OpenOptions {
  std::string provider = "cpu";
  std::string provider_library;
  int32_t device = 0;
  int32_t threads = 0;
  bool verify = true;
  void *cuda_stream = nullptr;
};

// Eight-bit RGB; a stride of 0 is 3 * width.
struct Picture {
  const uint8_t *data;
  int64_t width;
  int64_t height;
  int64_t stride = 0;
};

// What is not set is the bundle's default.
struct Arguments {
  std::optional<int64_t> num_frames;
  std::optional<int64_t> num_inference_steps;
  std::optional<std::vector<double>> sigmas;
  std::optional<std::string> schedule;
  std::optional<double> min_guidance_scale;
  std::optional<double> max_guidance_scale;
  std::optional<std::string> guidance_shape;
  std::optional<std::array<double, 2>> guidance_interval;
  std::optional<int64_t> fps;
  std::optional<int64_t> motion_bucket_id;
  std::optional<double> noise_aug_strength;
  std::optional<int64_t> decode_chunk_size;
  std::optional<int64_t> deep_every;
  std::optional<int64_t> num_videos_per_prompt;
  std::optional<uint64_t> seed;
  std::optional<std::vector<uint64_t>> seeds; // a seed for each video, instead of `seed`
  std::optional<int64_t> height;
  std::optional<int64_t> width;
  std::optional<std::string> sampler;
  std::optional<std::string> quality;
  std::optional<std::string> resize_mode;
  std::optional<std::string> background;
};

// Every default decided.
struct Settings {
  int64_t num_frames;
  int64_t num_inference_steps;
  std::vector<double> sigmas;
  std::string schedule; // empty if the noise levels are the caller's or the checkpoint's own
  double min_guidance_scale;
  double max_guidance_scale;
  std::string guidance_shape;
  std::optional<std::array<double, 2>> guidance_interval;
  int64_t fps;
  int64_t motion_bucket_id;
  double noise_aug_strength;
  int64_t decode_chunk_size;
  int64_t deep_every;
  int64_t num_videos_per_prompt;
  std::vector<uint64_t> seeds; // one, or one for each video
  int64_t height;
  int64_t width;
  std::string sampler;
  std::string quality; // empty without a preset
  std::string resize_mode;
  std::string background; // "#rrggbb"
};

using Progress = std::function<void(const std::string &stage, int64_t done, int64_t total)>;

struct StreamOptions {
  Progress progress;
  std::vector<float> latents; // noise of unit variance [B, F, C, h, w]; empty: the seed's
  bool frames_on_device = false;
};

using Frame = svd_trt_frame;

struct Check {
  std::string name;
  double difference;
  double allowed;
  bool passed() const { return difference <= allowed; } // false if it is not a number
};

// Frames of a generation. A frame's data is valid until the next frame is requested, by any thread, or the stream ends
// its life. Several threads may call the functions of a stream; it must outlive them, so one that another thread waits
// on is cancelled first, and destroyed when that thread is done.
class Stream {
public:
  Stream(Stream &&other) noexcept
      : handle_(std::exchange(other.handle_, nullptr)), progress_(std::move(other.progress_)) {}
  Stream &operator=(Stream &&other) noexcept {
    std::swap(handle_, other.handle_);
    std::swap(progress_, other.progress_);
    return *this;
  }
  Stream(const Stream &) = delete;
  Stream &operator=(const Stream &) = delete;
  ~Stream() { svd_trt_stream_close(handle_); }

  // False at the end.
  bool next(Frame &frame) {
    frame.size = sizeof frame;
    const svd_trt_status status = svd_trt_stream_next(handle_, &frame);
    rethrow();
    detail::require(status);
    return status == SVD_TRT_OK;
  }

  // Instead of frames: the denoised latents of all videos, [B, F, C, h, w].
  std::vector<float> latents() {
    size_t count = 0;
    detail::require(svd_trt_stream_latents(handle_, nullptr, 0, &count));
    std::vector<float> found(count);
    const svd_trt_status status = svd_trt_stream_latents(handle_, found.data(), count, nullptr);
    rethrow();
    detail::require(status);
    return found;
  }

  // From any thread.
  void cancel() { detail::require(svd_trt_stream_cancel(handle_)); }

  int64_t videos() const {
    int64_t count = 0;
    detail::require(svd_trt_stream_videos(handle_, &count));
    return count;
  }

  Settings settings() const {
    svd_trt_arguments s{};
    s.size = sizeof s;
    detail::require(svd_trt_stream_settings(handle_, &s));
    std::optional<std::array<double, 2>> interval;
    if (s.guidance_interval != nullptr) interval = {s.guidance_interval[0], s.guidance_interval[1]};
    return {s.num_frames,
            s.num_inference_steps,
            {s.sigmas, s.sigmas + s.sigmas_count},
            s.schedule == nullptr ? "" : s.schedule,
            s.min_guidance_scale,
            s.max_guidance_scale,
            s.guidance_shape,
            interval,
            s.fps,
            s.motion_bucket_id,
            s.noise_aug_strength,
            s.decode_chunk_size,
            s.deep_every,
            s.num_videos_per_prompt,
            s.seeds == nullptr ? std::vector<uint64_t>{s.seed}
                               : std::vector<uint64_t>(s.seeds, s.seeds + s.seeds_count),
            s.height,
            s.width,
            s.sampler,
            s.quality == nullptr ? "" : s.quality,
            s.resize_mode,
            s.background};
  }

  class Iterator {
  public:
    using iterator_category = std::input_iterator_tag;
    using value_type = Frame;
    using difference_type = std::ptrdiff_t;
    using pointer = const Frame *;
    using reference = const Frame &;
    Iterator() = default;
    explicit Iterator(Stream *stream) : stream_(stream) { ++*this; }
    reference operator*() const { return frame_; }
    pointer operator->() const { return &frame_; }
    Iterator &operator++() {
      if (!stream_->next(frame_)) stream_ = nullptr;
      return *this;
    }
    void operator++(int) { ++*this; }
    bool operator==(const Iterator &other) const { return stream_ == other.stream_; }
    bool operator!=(const Iterator &other) const { return stream_ != other.stream_; }

  private:
    Stream *stream_ = nullptr;
    Frame frame_{};
  };
  Iterator begin() { return Iterator(this); }
  Iterator end() { return {}; }

private:
  friend class Pipeline;
  Stream() = default;

  // What a callback threw in this thread: the library calls it in the thread that waits for a frame.
  static std::exception_ptr &thrown() {
    static thread_local std::exception_ptr exception;
    return exception;
  }
  static void rethrow() {
    if (thrown()) std::rethrow_exception(std::exchange(thrown(), nullptr));
  }
  static int32_t on_progress(void *user, const char *stage, int64_t done, int64_t total) noexcept {
    try {
      (*static_cast<const Progress *>(user))(stage, done, total);
      return 0;
    } catch (...) {
      thrown() = std::current_exception();
      return 1;
    }
  }

  svd_trt_stream *handle_ = nullptr;
  std::unique_ptr<Progress> progress_; // the library holds its address
};

class Pipeline {
public:
  explicit Pipeline(const std::string &bundle, const OpenOptions &options = {}) {
    svd_trt_open_options o;
    detail::require(svd_trt_open_options_init(&o, sizeof o));
    o.provider = options.provider.c_str();
    o.provider_library = options.provider_library.empty() ? nullptr : options.provider_library.c_str();
    o.device = options.device;
    o.threads = options.threads;
    o.verify = options.verify;
    o.cuda_stream = options.cuda_stream;
    detail::require(svd_trt_pipeline_open(bundle.c_str(), &o, &handle_));
  }
  Pipeline(Pipeline &&other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Pipeline &operator=(Pipeline &&other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  Pipeline(const Pipeline &) = delete;
  Pipeline &operator=(const Pipeline &) = delete;
  ~Pipeline() { svd_trt_pipeline_close(handle_); }

  // The pictures are copied.
  Stream stream(const Picture &picture, const Arguments &arguments = {}, StreamOptions options = {}) {
    return stream(std::vector<Picture>{picture}, arguments, std::move(options));
  }

  // A video of each picture, or several.
  Stream stream(const std::vector<Picture> &pictures, const Arguments &arguments = {}, StreamOptions options = {}) {
    std::vector<svd_trt_picture> views;
    for (const Picture &one : pictures)
      views.push_back({sizeof(svd_trt_picture), one.data, one.width, one.height, one.stride});
    const svd_trt_arguments given = convert(arguments);
    Stream stream;
    stream.progress_ = std::make_unique<Progress>(std::move(options.progress));
    svd_trt_stream_options o;
    detail::require(svd_trt_stream_options_init(&o, sizeof o));
    o.progress = *stream.progress_ ? &Stream::on_progress : nullptr;
    o.user = stream.progress_.get();
    o.latents = options.latents.empty() ? nullptr : options.latents.data();
    o.latents_count = options.latents.size();
    o.frames_on_device = options.frames_on_device;
    detail::require(svd_trt_stream_open(handle_, views.data(), views.size(), &given, &o, &stream.handle_));
    return stream;
  }

  // Cancels every stream. From any thread.
  void cancel() { detail::require(svd_trt_pipeline_cancel(handle_)); }
  void release() { detail::require(svd_trt_pipeline_release(handle_)); }
  // Ends the streams' work; every later call fails.
  void close() { detail::require(svd_trt_pipeline_close(std::exchange(handle_, nullptr))); }

  std::string manifest() const {
    const char *text = nullptr;
    detail::require(svd_trt_pipeline_manifest(handle_, &text));
    return text;
  }

  // Compares what the library gets with the bundle's golden values. Does not throw if a value differs.
  std::vector<Check> self_test() {
    std::vector<Check> checks;
    const auto add = [](void *user, const char *name, double difference, double allowed) {
      static_cast<std::vector<Check> *>(user)->push_back({name, difference, allowed});
    };
    const svd_trt_status status = svd_trt_pipeline_self_test(handle_, add, &checks);
    if (status != SVD_TRT_SELF_TEST_ERROR) detail::require(status);
    return checks;
  }

private:
  svd_trt_arguments convert(const Arguments &a) const {
    svd_trt_arguments c;
    detail::require(svd_trt_arguments_init(handle_, &c, sizeof c));
    c.num_frames = a.num_frames.value_or(c.num_frames);
    if (a.num_inference_steps == 0) // which in C is the default
      throw Error(SVD_TRT_ARGUMENT_ERROR, "num_inference_steps must be 1 to 1000, not 0");
    c.num_inference_steps = a.num_inference_steps.value_or(0);
    if (a.sigmas) {
      static const double none = 0; // an empty list is not the same as no list
      c.sigmas = a.sigmas->empty() ? &none : a.sigmas->data();
      c.sigmas_count = a.sigmas->size();
    }
    c.min_guidance_scale = a.min_guidance_scale.value_or(c.min_guidance_scale);
    c.max_guidance_scale = a.max_guidance_scale.value_or(c.max_guidance_scale);
    if (a.guidance_shape) c.guidance_shape = a.guidance_shape->c_str();
    if (a.guidance_interval) c.guidance_interval = a.guidance_interval->data();
    c.fps = a.fps.value_or(c.fps);
    c.motion_bucket_id = a.motion_bucket_id.value_or(c.motion_bucket_id);
    c.noise_aug_strength = a.noise_aug_strength.value_or(c.noise_aug_strength);
    if (a.decode_chunk_size == 0) // which in C is the default
      throw Error(SVD_TRT_ARGUMENT_ERROR, "decode_chunk_size must be at least 1, not 0");
    c.decode_chunk_size = a.decode_chunk_size.value_or(0);
    if (a.deep_every == 0) // which in C is the default
      throw Error(SVD_TRT_ARGUMENT_ERROR, "deep_every must be 1 to 1000, not 0");
    c.deep_every = a.deep_every.value_or(0);
    c.num_videos_per_prompt = a.num_videos_per_prompt.value_or(c.num_videos_per_prompt);
    c.seed = a.seed.value_or(0);
    c.has_seed = a.seed.has_value();
    if (a.seeds) {
      static const uint64_t none = 0;
      c.seeds = a.seeds->empty() ? &none : a.seeds->data();
      c.seeds_count = a.seeds->size();
    }
    c.height = a.height.value_or(c.height);
    c.width = a.width.value_or(c.width);
    if (a.schedule) c.schedule = a.schedule->c_str();
    if (a.quality) c.quality = a.quality->c_str();
    if (a.sampler) c.sampler = a.sampler->c_str();
    if (a.resize_mode) c.resize_mode = a.resize_mode->c_str();
    if (a.background) c.background = a.background->c_str();
    return c;
  }

  svd_trt_pipeline *handle_ = nullptr;
};

} // namespace svd_trt
#endif
