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

// Steps `latents` [B, F, C, h, w] through the table, in place. Throws Failure (backend, cancelled).
void denoise(Session &denoiser, Kinds &kinds, const std::vector<bool> &guided_steps, const std::vector<Row> &table,
             HostTensor<float> &latents, const Cancellation &cancellation, const std::function<void()> &on_step);

} // namespace svd_trt::detail
