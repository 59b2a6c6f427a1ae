#include "golden.hpp"

#include <cmath>
#include <limits>

#include "error.hpp"
#include "json.hpp"

namespace svd_trt::detail {
namespace {

using Json = nlohmann::json;

// The largest difference of two lists; infinite if the lengths differ or nothing was compared, not a number if a value
// is not.
class Worst {
public:
  void add(double got, double wanted, bool relative = false) {
    const double difference = std::fabs(got - wanted) / (relative ? std::max(std::fabs(wanted), 1e-12) : 1.0);
    if (!std::isnan(value_) && !(difference <= value_)) value_ = difference;
    empty_ = false;
  }
  void lengths(size_t got, size_t wanted) {
    if (got != wanted) value_ = std::numeric_limits<double>::infinity();
  }
  double value() const { return empty_ ? std::numeric_limits<double>::infinity() : value_; }

private:
  double value_ = 0;
  bool empty_ = true;
};

void check_noise(const Json &values, const OnCheck &on_check) {
  Worst full, half;
  for (const Json &noise : values.at("noise")) {
    Generator generator(noise.at("seed").get<uint64_t>());
    for (const Json &draw : noise.at("draws")) {
      const bool is_half = draw.at("dtype") == "float16";
      const auto wanted = draw.at("values").get<std::vector<double>>();
      const std::vector<float> got = generator.normal(wanted.size(), is_half);
      for (size_t i = 0; i < wanted.size(); ++i) (is_half ? half : full).add(got[i], wanted[i]);
    }
  }
  on_check("noise", full.value(), 1e-5);
  on_check("float16 noise", half.value(), 2e-3);
}

void check_schedules(const Json &values, const Manifest &manifest, const OnCheck &on_check) {
  Worst worst;
  for (const Json &schedule : values.at("schedules")) {
    const std::vector<float> sigmas = checkpoint_sigmas(manifest.sampler, schedule.at("steps"));
    const auto wanted = schedule.at("sigmas").get<std::vector<double>>();
    worst.lengths(sigmas.size(), wanted.size());
    for (size_t i = 0; i < std::min(sigmas.size(), wanted.size()); ++i) worst.add(sigmas[i], wanted[i], true);
    worst.add(initial_scale(manifest.initial_scale, sigmas), schedule.at("initial_scale"), true);
    const std::vector<Row> table = step_table(manifest.sampler.solver, sigmas);
    const auto rows = schedule.at("coefficients").get<std::vector<std::vector<double>>>();
    worst.lengths(table.size(), rows.size());
    for (size_t i = 0; i < std::min(table.size(), rows.size()); ++i) {
      worst.lengths(kCoefficients, rows[i].size());
      for (size_t j = 0; j < std::min(kCoefficients, rows[i].size()); ++j) worst.add(table[i][j], rows[i][j], true);
    }
  }
  on_check("schedule", worst.value(), 1e-6);
}

void check_tensor(const char *name, const std::vector<float> &got, const Json &wanted, double allowed,
                  const OnCheck &on_check) {
  Worst worst;
  worst.lengths(got.size(), elements(wanted.at("shape").get<std::vector<int64_t>>()));
  const auto samples = wanted.at("samples").get<std::vector<double>>();
  const auto stride = wanted.at("stride").get<size_t>();
  for (size_t i = 0; i < samples.size(); ++i) {
    if (i * stride >= got.size()) throw bundle_error("its golden values do not fit their shape");
    worst.add(got[i * stride], samples[i]);
  }
  on_check(name, worst.value(), allowed);
}

void check_picture(const Json &values, const Manifest &manifest, const Picture &picture, const OnCheck &on_check) {
  const Model &model = manifest.model;
  std::vector<float> pixels(static_cast<size_t>(3 * model.image_size * model.image_size));
  clip_pixels(picture, model.image_size, model.image_mean, model.image_std, pixels.data());
  check_tensor("image encoder's input", pixels, values.at("pixels"), 1e-5, on_check);
  const int64_t height = manifest.range("height").min, width = manifest.range("width").min;
  std::vector<float> image(static_cast<size_t>(3 * height * width));
  vae_image(picture, height, width, image.data());
  check_tensor("VAE encoder's input", image, values.at("image"), 1e-6, on_check);
}

svd_trt_arguments arguments_of(const Json &json, const Manifest &manifest) {
  svd_trt_arguments a = default_arguments(manifest);
  a.seed = json.at("seed"), a.has_seed = 1;
  a.num_inference_steps = json.at("num_inference_steps");
  a.num_frames = json.at("num_frames");
  a.height = json.at("height");
  a.width = json.at("width");
  a.num_videos_per_prompt = json.at("num_videos_per_prompt");
  a.decode_chunk_size = json.at("decode_chunk_size"); // its temporal layers see the frames of a chunk alone
  return a;
}

void check_video(const Json &video, const std::shared_ptr<const Shared> &shared, const Picture &picture,
                 const std::string &recorded, const OnCheck &on_check) {
  const Manifest &manifest = shared->bundle.manifest;
  Settings settings = resolve(arguments_of(video.at("arguments"), manifest), manifest, 1);
  const size_t bytes = static_cast<size_t>(settings.height * settings.width * 3);
  Generation generation(shared, settings, {picture}, {}, false, {});
  Worst worst;
  worst.lengths(recorded.size(), bytes * static_cast<size_t>(settings.videos * settings.num_frames));
  FrameView frame{};
  for (size_t at = 0; generation.next(frame) && at + bytes <= recorded.size(); at += bytes)
    for (size_t i = 0; i < bytes; ++i) worst.add(frame.data[i], static_cast<uint8_t>(recorded[at + i]));
  on_check("frames of a video", worst.value(), video.at("levels"));
}

} // namespace

void check_golden(const std::shared_ptr<const Shared> &shared, const OnCheck &on_check) {
  const Bundle &bundle = shared->bundle;
  const Manifest &manifest = bundle.manifest;
  if (!manifest.golden_values || !manifest.golden_picture)
    throw bundle_error(bundle.path.u8string() + " has no golden values");
  const auto read = [&](const File &file) { return read_file(bundle.path / std::filesystem::u8path(file.path)); };
  compare_golden(read(*manifest.golden_values), read_ppm(read(*manifest.golden_picture)),
                 manifest.golden_frames ? read(*manifest.golden_frames) : "", shared, on_check);
}

void compare_golden(const std::string &text, const Picture &picture, const std::string &frames,
                    const std::shared_ptr<const Shared> &shared, const OnCheck &on_check) {
  const Manifest &manifest = shared->bundle.manifest;
  try {
    const Json values = parse_json(text);
    check_noise(values, on_check);
    check_schedules(values, manifest, on_check);
    check_picture(values, manifest, picture, on_check);
    if (values.at("video").is_object() && manifest.golden_frames)
      check_video(values.at("video"), shared, picture, frames, on_check);
  } catch (const Json::exception &error) {
    throw bundle_error("its golden values cannot be read (" + std::string(error.what()) + ")");
  }
}

Picture read_ppm(const std::string &bytes) {
  size_t at = 2;
  const auto number = [&] {
    while (at < bytes.size() && (std::isspace(static_cast<unsigned char>(bytes[at])) || bytes[at] == '#')) {
      if (bytes[at] == '#') at = std::min(bytes.find('\n', at), bytes.size() - 1);
      ++at;
    }
    int64_t value = 0;
    for (; at < bytes.size() && bytes[at] >= '0' && bytes[at] <= '9' && value < 1 << 24; ++at)
      value = value * 10 + (bytes[at] - '0');
    return value;
  };
  const bool known = bytes.compare(0, 2, "P6") == 0;
  const int64_t width = known ? number() : 0, height = number(), top = number();
  if (!known || top != 255 || width < 1 || height < 1 || width > 65535 || height > 65535 ||
      bytes.size() < at + 1 + static_cast<size_t>(width * height * 3))
    throw image_error("a picture is not a whole PPM of 8 bits (P6); convert it: magick PICTURE -depth 8 PICTURE.ppm");
  const auto *first = reinterpret_cast<const uint8_t *>(bytes.data()) + at + 1;
  return {width, height, {first, first + width * height * 3}};
}

} // namespace svd_trt::detail
