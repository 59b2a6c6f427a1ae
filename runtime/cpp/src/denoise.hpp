// The denoising loop of one group of videos.
#pragma once

#include <array>
#include <functional>
#include <vector>

#include "manifest.hpp"
#include "networks.hpp"
#include "schedule.hpp"

namespace svd_trt::detail {

// The denoiser's inputs that stay the same in every step, for one pass: the host's memory and its views.
struct Pass {
  HostTensor<float> image_latents, image_embeds, added_time_ids, guidance;
  HostTensor<float> coefficients; // of the step
  bool last;
};

// The passes of a step without guidance, and of one with it; a kind that no step has is empty.
using Kinds = std::array<std::vector<Pass>, 2>;

// The denoiser's inputs of a group for each pass of a step that is `guided` or not.
//
// `embeds` is [B, 1, D], `latents` [B, C, h, w], `times` the values of added_time_ids, `scales` the guidance scale of
// each frame.
std::vector<Pass> make_passes(const Manifest &manifest, bool guided, const HostTensor<float> &embeds,
                              const HostTensor<float> &latents, const std::vector<float> &times,
                              const std::vector<float> &scales);

// Whether each step runs all levels of the UNet: the first, every `every`-th after it, and each that has other branches
// than the one before, from which counting starts again (arXiv:2312.00858).
std::vector<bool> deep_steps(int64_t every, const std::vector<bool> &guided_steps);

// The steps that leave out the deep levels: they take what the denoiser left in an earlier step.
struct ShallowSteps {
  Session *denoiser; // null: there are none
  std::vector<bool> deep;
  int64_t channels; // of the features
  Type type;
};

// Steps `latents` [B, F, C, h, w] through the table, in place. The first steps get `noise`, one tensor of that shape
// each, in the place of the denoised latents of the step before. Throws Failure (backend, cancelled).
void denoise(Session &denoiser, const ShallowSteps &shallow, Kinds &kinds, const std::vector<bool> &guided_steps,
             const std::vector<Row> &table, HostTensor<float> &latents, std::vector<HostTensor<float>> &noise,
             const Cancellation &cancellation, const std::function<void()> &on_step);

} // namespace svd_trt::detail
