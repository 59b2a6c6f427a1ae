#include "generation.hpp"

#include <algorithm>
#include <cstring>

#include "denoise.hpp"
#include "error.hpp"
#include "guidance.hpp"

namespace svd_trt::detail {

// Lets one thread at a time work on a generation. After a failure, the generation has ended.
class Generation::Turn {
public:
  explicit Turn(Generation &generation) : generation_(generation) {
    {
      const std::lock_guard<std::mutex> lock(generation.running_mutex_);
      if (generation.running_ == std::this_thread::get_id())
        throw argument_error("a callback cannot use the stream that calls it; it may cancel or close it");
    }
    lock_ = std::unique_lock<std::mutex>(generation.mutex_);
    set(std::this_thread::get_id());
  }
  ~Turn() { set({}); }
  Turn(const Turn &) = delete;
  Turn &operator=(const Turn &) = delete;

private:
  void set(std::thread::id id) {
    const std::lock_guard<std::mutex> lock(generation_.running_mutex_);
    generation_.running_ = id;
  }
  Generation &generation_;
  std::unique_lock<std::mutex> lock_;
};

Generation::Generation(std::shared_ptr<const Shared> shared, Settings settings, std::vector<Picture> pictures,
                       std::vector<float> start, bool frames_on_device, Progress progress)
    : shared_(std::move(shared)), manifest_(shared_->bundle.manifest), settings_(std::move(settings)),
      frames_on_device_(frames_on_device), progress_(std::move(progress)), pictures_(std::move(pictures)),
      start_(std::move(start)) {
  Sizes all = sizes();
  all["batch"] = settings_.videos;
  latent_shape_ = resolved(manifest_.draws[1].shape, all);
  if (!start_.empty() && start_.size() != latents_count())
    throw argument_error("latents must have " + std::to_string(latents_count()) + " values, not " +
                         std::to_string(start_.size()));
  if (!std::all_of(start_.begin(), start_.end(), [](float v) { return std::isfinite(v); }))
    throw argument_error("latents must be finite");
}

Sizes Generation::sizes() const {
  return {{"height", settings_.height}, {"width", settings_.width}, {"frames", settings_.num_frames}};
}

bool Generation::next(FrameView &frame) {
  const Turn turn(*this);
  fail_if_ended();
  if (finished_) return false;
  try {
    if (!begun_) begin();
    const int64_t in_chunk = frames_.shape.empty() ? 0 : frames_.shape[0];
    if (frames_given_ == in_chunk) {
      if (chunk_ == settings_.chunks.size()) {
        cancellation_.check();
        finished_ = true;
        release();
        return false;
      }
      decode_chunk();
    }
    cancellation_.check();
  } catch (...) {
    ended_ = true;
    release();
    throw;
  }
  const int64_t total = frames_decoded_ - frames_.shape[0] + frames_given_;
  const size_t bytes = static_cast<size_t>(settings_.height * settings_.width * 3);
  const uint8_t *data = frames_on_device_ ? frames_device_.GetTensorData<uint8_t>() : frames_.data.data();
  frame = {data + static_cast<size_t>(frames_given_) * bytes, total / settings_.num_frames,
           total % settings_.num_frames};
  ++frames_given_;
  return true;
}

void Generation::latents(float *values) {
  const Turn turn(*this);
  fail_if_ended();
  if (frames_decoded_ != 0)
    throw argument_error("the stream has already handed out frames; open another one for latents");
  try {
    if (!begun_) begin();
    while (group_ < settings_.groups.size()) denoise_group();
  } catch (...) {
    ended_ = true;
    release();
    throw;
  }
  std::copy(latents_.begin(), latents_.end(), values);
}

void Generation::fail_if_ended() {
  if (cancellation_.cancelled()) release();
  cancellation_.check();
  if (ended_) throw backend_error("the stream ended with an error; open another one");
}

// The stream may stay open long after its end, so it keeps neither tensors nor, once the pipeline is closed, networks.
void Generation::release() {
  pictures_ = {};
  start_ = latents_ = {};
  conditions_ = {};
  step_noise_ = {};
  frames_ = {};
  frames_device_ = Ort::Value{nullptr};
  decoder_.reset();
  shared_.reset();
}

void Generation::report(const char *stage, int64_t done, int64_t total) {
  cancellation_.check(); // after svd_trt_stream_close has returned, the callback must not be called again
  if (progress_ && !progress_(stage, done, total)) cancellation_.cancel("the progress callback cancelled the stream");
  cancellation_.check();
}

void Generation::begin() {
  cancellation_.check();
  // Noise of the pictures first, then of all latents, as diffusers draws it, then of each step that takes some.
  Sizes all = sizes();
  all["pictures"] = static_cast<int64_t>(pictures_.size());
  std::vector<Generator> sources;
  for (const uint64_t seed : settings_.seeds) sources.emplace_back(seed);
  const auto draw = [&](const std::vector<int64_t> &shape, bool half) {
    const auto rows = static_cast<size_t>(shape[0]);
    return draw_rows(sources, rows, elements(shape) / rows, half);
  };
  HostTensor<float> image_noise;
  image_noise.shape = resolved(manifest_.draws[0].shape, all);
  image_noise.data = draw(image_noise.shape, manifest_.draws[0].half);
  if (start_.empty()) start_ = draw(latent_shape_, manifest_.draws[1].half);
  const auto scale = static_cast<float>(initial_scale(manifest_.initial_scale, settings_.sigmas));
  for (float &value : start_) value *= scale;
  table_ = step_table(settings_.sampler, settings_.sigmas);
  for (size_t i = noisy_steps(settings_.sampler, settings_.sigmas); i > 0; --i)
    step_noise_.push_back(draw(latent_shape_, manifest_.draws[1].half));
  encode(image_noise);
  pictures_ = {};
  begun_ = true;
}

void Generation::encode(const HostTensor<float> &image_noise) {
  const Model &model = manifest_.model;
  const auto count = static_cast<int64_t>(pictures_.size());
  report("encode", 0, count);
  const std::shared_ptr<Session> clip = shared_->networks->get("image_encoder"),
                                 vae = shared_->networks->get("vae_encoder");
  const auto strength = static_cast<float>(settings_.number(manifest_.image_noise));
  const int64_t factor = model.vae_scale_factor;
  conditions_.image_embeds = HostTensor<float>({count, 1, model.embed_dim});
  conditions_.image_latents =
      HostTensor<float>({count, model.latent_channels, settings_.height / factor, settings_.width / factor});
  const auto run = [&](Session &session, HostTensor<float> &input, HostTensor<float> &all, int64_t first) {
    std::vector<int64_t> shape = all.shape;
    shape[0] = input.shape[0];
    const size_t each = all.data.size() / static_cast<size_t>(count);
    Ort::IoBinding binding = session.binding();
    binding.BindInput(session.spec().inputs.at(0).name.c_str(), view(input.data.data(), input.shape));
    binding.BindOutput(session.spec().outputs.at(0).name.c_str(),
                       view(&all.data[static_cast<size_t>(first) * each], shape));
    session.run(binding, cancellation_);
  };
  int64_t first = 0;
  for (const int64_t size : settings_.picture_groups) {
    HostTensor<float> pixels({size, 3, model.image_size, model.image_size});
    HostTensor<float> images({size, 3, settings_.height, settings_.width});
    const size_t pixel_count = pixels.data.size() / static_cast<size_t>(size);
    const size_t image_count = images.data.size() / static_cast<size_t>(size);
    for (int64_t i = 0; i < size; ++i) {
      cancellation_.check();
      const auto at = static_cast<size_t>(i), index = static_cast<size_t>(first + i);
      const Picture picture = framed(std::move(pictures_[index]), settings_.height, settings_.width, settings_.resize,
                                     settings_.background);
      clip_pixels(picture, model.image_size, model.image_mean, model.image_std, &pixels.data[at * pixel_count]);
      float *image = &images.data[at * image_count];
      vae_image(picture, settings_.height, settings_.width, image);
      const float *drawn = &image_noise.data[index * image_count];
      for (size_t j = 0; j < image_count; ++j) image[j] += strength * drawn[j];
    }
    run(*clip, pixels, conditions_.image_embeds, first);
    run(*vae, images, conditions_.image_latents, first);
    first += size;
    report("encode", first, count);
  }
}

void Generation::denoise_group() {
  const int64_t size = settings_.groups[group_], steps = static_cast<int64_t>(table_.size());
  const int64_t total = steps * static_cast<int64_t>(settings_.groups.size());
  if (group_ == 0) report("denoise", 0, total);
  const std::shared_ptr<Session> denoiser = shared_->networks->get("denoiser");

  std::vector<int64_t> shape = latent_shape_;
  shape[0] = size;
  HostTensor<float> latents(shape);
  const size_t each = latents.data.size() / static_cast<size_t>(size);
  std::copy_n(&start_[static_cast<size_t>(videos_denoised_) * each], latents.data.size(), latents.data.begin());

  std::vector<HostTensor<float>> noise;
  for (const std::vector<float> &all : step_noise_) {
    noise.emplace_back(shape);
    std::copy_n(&all[static_cast<size_t>(videos_denoised_) * each], latents.data.size(), noise.back().data.begin());
  }

  const auto of_videos = [&](const HostTensor<float> &all) { // the condition of each video's picture
    std::vector<int64_t> dimensions = all.shape;
    dimensions[0] = size;
    HostTensor<float> part(dimensions);
    const size_t width = part.data.size() / static_cast<size_t>(size);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t picture = (videos_denoised_ + i) / settings_.num_videos_per_prompt;
      std::copy_n(&all.data[static_cast<size_t>(picture) * width], width, &part.data[static_cast<size_t>(i) * width]);
    }
    return part;
  };
  std::vector<float> times;
  for (const Condition &condition : manifest_.conditions)
    times.push_back(static_cast<float>(settings_.number(condition.argument) + condition.add));
  const std::vector<float> scales =
      guidance_scales(settings_.guidance_shape, settings_.number(manifest_.first_frame_scale),
                      settings_.number(manifest_.last_frame_scale), settings_.num_frames);
  const HostTensor<float> embeds = of_videos(conditions_.image_embeds), images = of_videos(conditions_.image_latents);
  Kinds kinds;
  for (const bool guided : settings_.guided_steps)
    if (std::vector<Pass> &passes = kinds[guided ? 1 : 0]; passes.empty())
      passes = make_passes(manifest_, guided, embeds, images, times, scales);
  int64_t done = steps * static_cast<int64_t>(group_);
  ShallowSteps shallow{nullptr, deep_steps(settings_.deep_every, settings_.guided_steps), 0, Type::float32};
  std::shared_ptr<Session> shallow_denoiser;
  if (std::find(shallow.deep.begin(), shallow.deep.end(), false) != shallow.deep.end()) {
    shallow_denoiser = shared_->networks->get("shallow_denoiser");
    shallow.denoiser = shallow_denoiser.get();
    shallow.channels = *manifest_.deep_channels;
    shallow.type = shallow_denoiser->spec().inputs.back().type;
  }
  denoise(*denoiser, shallow, kinds, settings_.guided_steps, table_, latents, noise, cancellation_,
          [&] { report("denoise", ++done, total); });
  latents_.insert(latents_.end(), latents.data.begin(), latents.data.end());
  videos_denoised_ += size;
  ++group_;
}

void Generation::decode_chunk() {
  const int64_t size = settings_.chunks[chunk_], total = settings_.videos * settings_.num_frames;
  const size_t each = latents_count() / static_cast<size_t>(total), wanted = static_cast<size_t>(size) * each;
  // A chunk runs on over the end of a video into the next.
  while (latents_.size() < wanted) denoise_group();
  if (frames_decoded_ == 0) report("decode", 0, total);
  if (!decoder_) decoder_ = shared_->networks->get("vae_decoder");

  const std::vector<int64_t> frame_shape{size, settings_.height, settings_.width, 3};
  frames_given_ = 0;
  Ort::IoBinding binding = decoder_->binding();
  std::vector<int64_t> shape(latent_shape_.begin() + 1, latent_shape_.end()); // [n, C, h, w]
  shape[0] = size;
  binding.BindInput(decoder_->spec().inputs.at(0).name.c_str(), view(latents_.data(), shape));
  frames_.shape = frame_shape;
  if (frames_on_device_) {
    frames_device_ = decoder_->empty(frame_shape, Type::uint8);
    binding.BindOutput(decoder_->spec().outputs.at(0).name.c_str(), frames_device_);
  } else {
    frames_.data.resize(elements(frame_shape));
    binding.BindOutput(decoder_->spec().outputs.at(0).name.c_str(), view(frames_.data.data(), frame_shape));
  }
  decoder_->run(binding, cancellation_);
  latents_.erase(latents_.begin(), latents_.begin() + static_cast<std::ptrdiff_t>(wanted));
  frames_decoded_ += size;
  ++chunk_;
  report("decode", frames_decoded_, total);
}

} // namespace svd_trt::detail
