// The arguments of a generation: what the caller gives, checked against the bundle, becomes settings.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "svd_trt.h"

namespace svd_trt::detail {

enum class ResizeMode { stretch, crop, pad };

// Everything decided. Names are those of Python.
struct Settings {
  int64_t num_frames, num_inference_steps;
  std::vector<float> sigmas; // num_inference_steps + 1
  double min_guidance_scale, max_guidance_scale;
  std::string guidance_shape;
  std::optional<std::array<double, 2>> guidance_interval; // noise levels
  int64_t fps, motion_bucket_id;
  double noise_aug_strength;
  int64_t decode_chunk_size, deep_every, num_videos_per_prompt;
  std::vector<uint64_t> seeds; // one, or one for each video
  int64_t height, width;
  std::string schedule; // empty if the sigmas are the caller's or the checkpoint's own
  std::string sampler, resize_mode;
  std::string quality; // empty without a preset
  ResizeMode resize;
  std::array<uint8_t, 3> background;

  int64_t videos;                      // of all pictures
  std::vector<bool> guided_steps;      // num_inference_steps
  std::vector<int64_t> chunks;         // sizes of decode chunks, over all videos
  std::vector<int64_t> groups;         // videos that are denoised together
  std::vector<int64_t> picture_groups; // pictures that are encoded together

  // The value of an argument that `host` names. Throws Failure (bundle) if it is not a number.
  double number(const std::string &argument) const;
};

// The bundle's defaults. Texts point into the manifest.
svd_trt_arguments default_arguments(const Manifest &manifest);

// Throws Failure (argument): a value is malformed, or outside what the bundle was built for.
Settings resolve(const svd_trt_arguments &given, const Manifest &manifest, size_t pictures);

} // namespace svd_trt::detail
