#include "denoise.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "error.hpp"

namespace svd_trt::detail {
namespace {

constexpr const char *kDeepFeatures = "deep_features";

using Views = std::vector<std::pair<std::string, Ort::Value>>;

Views fixed_inputs(Pass &pass) {
  Views views;
  const auto add = [&](const char *name, HostTensor<float> &tensor) {
    views.emplace_back(name, view(tensor.data.data(), tensor.shape));
  };
  add("image_latents", pass.image_latents);
  add("image_embeds", pass.image_embeds);
  add("added_time_ids", pass.added_time_ids);
  add("guidance", pass.guidance);
  return views;
}

// Two pairs of buffers on the device swap roles, so a step is bound in three ways: the first one, which reads the
// host's memory, and then odd and even ones; all with guidance, or without, and of the denoiser and the shallow one. A
// step allocates nothing.
class Loop {
public:
  Loop(Session &denoiser, const ShallowSteps &shallow, Kinds &kinds, HostTensor<float> &start)
      : denoiser_(denoiser), shallow_(shallow), zeros_(start.shape) {
    for (int i = 0; i < 2; ++i) {
      latents_.push_back(denoiser.empty(start.shape, Type::float32));
      denoised_.push_back(denoiser.empty(start.shape, Type::float32));
    }
    for (size_t i = 0; i + 1 < std::max(kinds[0].size(), kinds[1].size()); ++i)
      partial_.push_back(denoiser.empty(start.shape, Type::float32));
    zeros_view_ = view(zeros_.data.data(), zeros_.shape);
    start_view_ = view(start.data.data(), start.shape);
    for (size_t kind = 0; kind < kinds.size(); ++kind)
      for (size_t pass = 0; pass < kinds[kind].size(); ++pass) bound_[kind].push_back(bind(kinds[kind][pass], pass));
  }

  void step(size_t index, bool guided, const Row &row, HostTensor<float> *noise, bool last,
            const Cancellation &cancellation) {
    const size_t way = index == 0 ? 0 : 1 + index % 2; // 2 is odd: it reads buffer 1
    for (Bound &pass : bound_[guided ? 1 : 0]) {
      std::vector<float> &coefficients = pass.inputs.coefficients.data;
      std::copy(row.begin(), row.end(), coefficients.begin());
      if (!pass.inputs.last) coefficients[kSkip] = 0; // the latents themselves are added once, in the last pass
      const bool deep = shallow_.denoiser == nullptr || shallow_.deep[index];
      Ort::IoBinding &binding = (deep ? pass.bindings : pass.shallow_bindings)[way];
      binding.BindInput("coefficients", pass.coefficients);
      if (noise != nullptr) binding.BindInput("previous_denoised", view(noise->data.data(), noise->shape));
      if (last && pass.inputs.last) binding.BindOutput("next_latents", start_view_); // to the host
      (deep ? denoiser_ : *shallow_.denoiser).run(binding, cancellation);
    }
  }

private:
  struct Bound {
    Pass &inputs;
    Views fixed;
    Ort::Value coefficients{nullptr};
    Ort::Value features{nullptr};                           // what a deep step leaves for shallow ones
    std::vector<Ort::IoBinding> bindings, shallow_bindings; // of the first step, of even ones and of odd ones
  };

  Bound bind(Pass &pass, size_t index) {
    Bound bound{pass, fixed_inputs(pass), view(pass.coefficients.data.data(), pass.coefficients.shape), {}, {}, {}};
    const bool shallow = shallow_.denoiser != nullptr;
    if (shallow) {
      const std::vector<int64_t> &video = zeros_.shape; // [B, F, C, h, w]
      bound.features = denoiser_.empty(
          {pass.guidance.shape[0], video[0], video[1], shallow_.channels, video[3] / 2, video[4] / 2}, shallow_.type);
    }
    for (size_t way = 0; way < 3; ++way) {
      bound.bindings.push_back(bind(denoiser_, bound, index, way));
      if (shallow) bound.bindings.back().BindOutput(kDeepFeatures, bound.features);
      if (shallow) bound.shallow_bindings.push_back(bind(*shallow_.denoiser, bound, index, way));
      if (shallow) bound.shallow_bindings.back().BindInput(kDeepFeatures, bound.features);
    }
    return bound;
  }

  Ort::IoBinding bind(Session &network, const Bound &bound, size_t index, size_t way) {
    const size_t from = way == 2 ? 1 : 0, to = 1 - from;
    Ort::IoBinding binding = network.binding();
    binding.BindInput("latents", way == 0 ? start_view_ : latents_[from]);
    binding.BindInput("previous_denoised", way == 0 ? zeros_view_ : denoised_[from]);
    binding.BindInput("partial_denoised", index == 0 ? zeros_view_ : partial_[index - 1]);
    for (const auto &[name, value] : bound.fixed) binding.BindInput(name.c_str(), value);
    binding.BindOutput("next_latents", latents_[to]);
    binding.BindOutput("denoised", bound.inputs.last ? denoised_[to] : partial_[index]);
    return binding;
  }

  Session &denoiser_;
  const ShallowSteps &shallow_;
  HostTensor<float> zeros_;
  std::vector<Ort::Value> latents_, denoised_, partial_;
  Ort::Value zeros_view_{nullptr}, start_view_{nullptr};
  std::array<std::vector<Bound>, 2> bound_; // passes of a step without guidance, and of one with it
};

} // namespace

std::vector<Pass> make_passes(const Manifest &manifest, bool guided, const HostTensor<float> &embeds,
                              const HostTensor<float> &latents, const std::vector<float> &times,
                              const std::vector<float> &scales) {
  std::vector<Branch> branches = manifest.branches;
  if (!guided) branches = {{true, 1.0f, 0.0f}};
  const auto most = static_cast<size_t>(manifest.range("branches").max);
  const int64_t videos = embeds.shape[0], frames = static_cast<int64_t>(scales.size());
  std::vector<Pass> passes;
  for (size_t first = 0; first < branches.size(); first += most) {
    const size_t count = std::min(most, branches.size() - first);
    const auto with_branches = [&](std::vector<int64_t> shape) {
      shape.insert(shape.begin(), static_cast<int64_t>(count));
      return HostTensor<float>(std::move(shape));
    };
    Pass pass{with_branches(latents.shape),
              with_branches(embeds.shape),
              HostTensor<float>({videos, static_cast<int64_t>(times.size())}),
              HostTensor<float>({static_cast<int64_t>(count), frames}),
              HostTensor<float>({static_cast<int64_t>(kCoefficients)}),
              first + count == branches.size()};
    for (size_t i = 0; i < count; ++i) {
      const Branch &branch = branches[first + i];
      if (branch.conditioned) { // else they stay zeros
        std::copy(latents.data.begin(), latents.data.end(), &pass.image_latents.data[i * latents.data.size()]);
        std::copy(embeds.data.begin(), embeds.data.end(), &pass.image_embeds.data[i * embeds.data.size()]);
      }
      for (size_t f = 0; f < scales.size(); ++f)
        pass.guidance.data[i * scales.size() + f] = branch.constant + branch.factor * scales[f];
    }
    for (size_t i = 0; i < pass.added_time_ids.data.size(); ++i) pass.added_time_ids.data[i] = times[i % times.size()];
    passes.push_back(std::move(pass));
  }
  return passes;
}

std::vector<bool> deep_steps(int64_t every, const std::vector<bool> &guided_steps) {
  std::vector<bool> deep;
  int64_t since = 0;
  for (size_t i = 0; i < guided_steps.size(); ++i) {
    since = i == 0 || guided_steps[i] != guided_steps[i - 1] ? 0 : since + 1;
    deep.push_back(since % every == 0);
  }
  return deep;
}

void denoise(Session &denoiser, const ShallowSteps &shallow, Kinds &kinds, const std::vector<bool> &guided_steps,
             const std::vector<Row> &table, HostTensor<float> &latents, std::vector<HostTensor<float>> &noise,
             const Cancellation &cancellation, const std::function<void()> &on_step) {
  Loop loop(denoiser, shallow, kinds, latents);
  for (size_t i = 0; i < table.size(); ++i) {
    HostTensor<float> *fresh = i < noise.size() ? &noise[i] : nullptr;
    loop.step(i, guided_steps[i], table[i], fresh, i + 1 == table.size(), cancellation);
    on_step();
  }
  if (!std::all_of(latents.data.begin(), latents.data.end(), [](float v) { return std::isfinite(v); }))
    throw backend_error("denoising ended in values that are not finite: fp16 overflowed (build with --precision fp32)");
}

} // namespace svd_trt::detail
