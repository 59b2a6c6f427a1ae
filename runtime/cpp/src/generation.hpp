// One generation, from pictures to frames: noise, encode, denoise, decode, see docs/bundle.md, "A host's loop".
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "arguments.hpp"
#include "bundle.hpp"
#include "networks.hpp"
#include "noise.hpp"
#include "picture.hpp"
#include "schedule.hpp"

namespace svd_trt::detail {

// False cancels the generation.
using Progress = std::function<bool(const char *stage, int64_t done, int64_t total)>;

// What a pipeline shares with its generations.
struct Shared {
  Bundle bundle;
  std::unique_ptr<Networks> networks;
};

// What videos are conditioned on.
struct Conditions {
  HostTensor<float> image_embeds;  // [P, 1, D]
  HostTensor<float> image_latents; // [P, C, h, w]
};

struct FrameView {
  const uint8_t *data;
  int64_t video, index;
};

class Generation {
public:
  Generation(std::shared_ptr<const Shared> shared, Settings settings, std::vector<Picture> pictures,
             std::vector<float> start, bool frames_on_device, Progress progress);

  const Settings &settings() const { return settings_; }
  bool on_device() const { return frames_on_device_; }
  size_t latents_count() const { return elements(latent_shape_); }

  // The next frame; false at the end. Calls from several threads wait for each other.
  // Throws Failure: cancelled, backend, or argument if called from a callback of this generation.
  bool next(FrameView &frame);

  // Instead of frames: the denoised latents of all videos. Throws Failure.
  void latents(float *values);

  // From any thread.
  void cancel(const std::string &reason) { cancellation_.cancel(reason); }

private:
  class Turn;
  void fail_if_ended();
  void release();
  void report(const char *stage, int64_t done, int64_t total);
  void begin();
  void encode(const HostTensor<float> &image_noise);
  void denoise_group();
  void decode_chunk();
  Sizes sizes() const;

  std::shared_ptr<const Shared> shared_; // null after the end
  const Manifest &manifest_;             // of shared_
  const Settings settings_;
  const bool frames_on_device_;
  const Progress progress_;
  Cancellation cancellation_;

  std::mutex mutex_; // guards everything below
  std::thread::id running_;
  std::mutex running_mutex_;
  std::vector<Picture> pictures_;     // until they are encoded
  std::vector<float> start_;          // noise at the first level of all videos
  std::vector<int64_t> latent_shape_; // [B, F, C, h, w]
  Conditions conditions_;
  std::vector<Row> table_;
  std::vector<std::vector<float>> step_noise_;            // of all videos, for the first steps
  bool begun_ = false, ended_ = false, finished_ = false; // ended_: by an error
  size_t group_ = 0, chunk_ = 0;                          // that come next
  int64_t videos_denoised_ = 0, frames_decoded_ = 0;
  std::vector<float> latents_;       // denoised, and not decoded yet
  std::shared_ptr<Session> decoder_; // owns the memory of frames_device_
  HostTensor<uint8_t> frames_;       // of the last chunk
  Ort::Value frames_device_{nullptr};
  int64_t frames_given_ = 0; // of the last chunk
};

} // namespace svd_trt::detail
