#include "arguments.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <random>

#include "chunks.hpp"
#include "error.hpp"
#include "guidance.hpp"
#include "schedule.hpp"
#include "text.hpp"

namespace svd_trt::detail {
namespace {

std::string shown(int64_t value) { return std::to_string(value); }
std::string shown(double value) { return to_text(value); }

template <class Number> void check_limits(const std::string &name, Number value, const Manifest &manifest) {
  const Argument &argument = manifest.arguments.at(name);
  if constexpr (std::is_floating_point_v<Number>)
    if (!std::isfinite(value)) throw argument_error(name + " must be a number, not " + shown(value));
  const auto number = static_cast<double>(value);
  if ((argument.min && number < *argument.min) || (argument.max && number > *argument.max))
    throw argument_error(name + " must be " +
                         (argument.max ? to_text(argument.min.value_or(0)) + " to " + to_text(*argument.max)
                                       : "at least " + to_text(argument.min.value_or(0))) +
                         ", not " + shown(value));
}

void check_range(const std::string &name, int64_t value, const Range &range, const std::string &option) {
  if (!range.holds(value))
    throw argument_error(name + " " + std::to_string(value) + " is outside what this bundle was built for (" +
                         range.words() + "); build one with another " + option);
}

void check_side(const std::string &name, int64_t value, const Manifest &manifest) {
  check_range(name, value, manifest.range(name), "--" + name);
  const auto found = manifest.multiples.find(name);
  const int64_t multiple = found == manifest.multiples.end() ? 1 : std::max<int64_t>(1, found->second);
  if (value % multiple != 0)
    throw argument_error(name + " " + std::to_string(value) + " is not a multiple of " + std::to_string(multiple));
}

std::string choice(const char *given, const std::string &name, const std::string &fallback,
                   const std::vector<std::string> &choices) {
  std::string value = given == nullptr ? fallback : given;
  std::replace(value.begin(), value.end(), '_', '-');
  if (std::find(choices.begin(), choices.end(), value) == choices.end()) {
    std::string all;
    for (const std::string &one : choices) all += (all.empty() ? "" : ", ") + one;
    throw argument_error(name + " must be one of " + all + ", not " + echoed(given == nullptr ? fallback : given));
  }
  return value;
}

// Arguments of a quality, which count if the caller does not give them; as in runtime/quality_presets.py.
struct Preset {
  std::string schedule;
  int64_t num_inference_steps;
  std::string sampler;
  std::optional<std::array<double, 2>> guidance_interval;
};

const std::map<std::string, Preset> kPresets{
    {"best", {"karras", 25, "unic", {}}},
    {"standard", {"ays", 10, "unic", {}}},
    {"fast", {"ays", 8, "unic", {{0, 50}}}},
    {"draft", {"ays", 5, "euler", {}}},
};

// Decides the noise levels, the sampler and where guidance acts.
void choose_steps(Settings &s, const svd_trt_arguments &given, const Manifest &manifest) {
  if (given.sigmas == nullptr && given.sigmas_count != 0)
    throw argument_error("sigmas is null, and sigmas_count is not 0");
  const auto steps = static_cast<int64_t>(manifest.arguments.at("num_inference_steps").default_number.value_or(25));
  Preset preset{"", steps, manifest.sampler.solver, {}};
  if (given.quality != nullptr) {
    s.quality = choice(given.quality, "quality", "", {"best", "standard", "fast", "draft"});
    preset = kPresets.at(s.quality);
  }
  const std::vector<std::string> schedules{"karras", "exponential", "ays"};
  if (given.schedule != nullptr) s.schedule = choice(given.schedule, "schedule", "", schedules);
  s.sampler = choice(given.sampler, "sampler", preset.sampler, {"euler", "unic", "dpmpp-2m", "ab2", "lcm"});
  const bool few = s.sampler == "lcm";
  s.guidance_interval = preset.guidance_interval;
  if (given.guidance_interval != nullptr) s.guidance_interval = checked_interval(given.guidance_interval);
  if (given.sigmas == nullptr) {
    const int64_t count = given.num_inference_steps != 0 ? given.num_inference_steps : preset.num_inference_steps;
    check_limits("num_inference_steps", count, manifest);
    if (given.schedule == nullptr) s.schedule = preset.schedule;
    s.sigmas = few && s.schedule.empty() ? lcm_sigmas(count) : named_sigmas(s.schedule, manifest.sampler, count);
  } else {
    if (given.schedule != nullptr) throw argument_error("schedule and sigmas were both given; give one of them");
    // Before they are read, because the count is the caller's claim about memory.
    if (given.sigmas_count > 2)
      check_limits("num_inference_steps", static_cast<int64_t>(std::min<size_t>(given.sigmas_count, INT64_MAX)) - 1,
                   manifest);
    s.sigmas = custom_sigmas(given.sigmas, given.sigmas_count);
  }
  s.num_inference_steps = static_cast<int64_t>(s.sigmas.size()) - 1;
  if (few) lcm_sigmas(s.num_inference_steps); // refuses too many, also with other levels
}

std::array<uint8_t, 3> colour(const char *given) {
  const std::string text = given == nullptr ? "black" : given;
  if (text == "black") return {0, 0, 0};
  if (text == "white") return {255, 255, 255};
  if (text.size() != 7 || text[0] != '#' || text.find_first_not_of("0123456789abcdefABCDEF", 1) != std::string::npos)
    throw argument_error("background must be black, white or a colour such as #ff8000, not " + echoed(text));
  const unsigned long rgb = std::stoul(text.substr(1), nullptr, 16);
  return {static_cast<uint8_t>(rgb >> 16), static_cast<uint8_t>(rgb >> 8 & 255), static_cast<uint8_t>(rgb & 255)};
}

void check_deep_every(int64_t value, const Manifest &manifest) {
  const double most = manifest.arguments.at("num_inference_steps").max.value_or(1000);
  if (value < 0 || static_cast<double>(value) > most)
    throw argument_error("deep_every must be 1 to " + to_text(most) + ", not " + shown(value));
  if (value > 1 && !manifest.deep_channels)
    throw argument_error("deep_every " + shown(value) +
                         " needs a shallow denoiser, and this bundle has none; build one with --shallow-steps, or "
                         "leave deep_every out");
}

// Cuts `count` videos or pictures into groups that a network takes together.
std::vector<int64_t> groups_of(int64_t count, const Range &span) {
  std::vector<int64_t> groups(static_cast<size_t>(count / span.max), span.max);
  if (count % span.max != 0) groups.push_back(count % span.max);
  if (groups.back() < span.min)
    throw argument_error(std::to_string(count) + " videos leave a group of " + std::to_string(groups.back()) +
                         ", and this bundle was built for at least " + std::to_string(span.min) +
                         " together; build one with another --batch");
  return groups;
}

void check_branches(const Range &branches, const std::vector<bool> &guided_steps) {
  const auto guided = std::count(guided_steps.begin(), guided_steps.end(), true);
  if (branches.holds(1) || guided == static_cast<std::ptrdiff_t>(guided_steps.size())) return;
  if (guided == 0)
    throw argument_error("a video without guidance runs one branch, and this bundle was built for both; raise "
                         "max_guidance_scale above 1, or build one with another --branches");
  throw argument_error("a step outside guidance_interval runs one branch, and this bundle was built for both; leave "
                       "guidance_interval out, or build one without --branches 2");
}

// One seed, or one for each of the `videos`.
std::vector<uint64_t> seeds_of(const svd_trt_arguments &given, int64_t videos) {
  const size_t count = given.seeds_count;
  if (given.seeds == nullptr && count != 0) throw argument_error("seeds is null, and seeds_count is not 0");
  if (given.has_seed == 0 && given.seed != 0)
    throw argument_error("seed is " + std::to_string(given.seed) + ", and has_seed is 0; set has_seed to 1");
  if (given.seeds == nullptr) return {given.has_seed != 0 ? given.seed : std::random_device{}()};
  if (given.has_seed != 0) throw argument_error("seed and seeds were both given; give one of them");
  if (count == 0) throw argument_error("seed is an empty list; give one seed, or one for each video");
  if (count != 1 && count != static_cast<size_t>(videos)) // before they are read
    throw argument_error(std::to_string(count) + " seeds were given for " + std::to_string(videos) + " video" +
                         (videos == 1 ? "" : "s") + "; give one for each video, or one for all");
  return {given.seeds, given.seeds + count};
}

} // namespace

double Settings::number(const std::string &argument) const {
  if (argument == "fps") return static_cast<double>(fps);
  if (argument == "motion_bucket_id") return static_cast<double>(motion_bucket_id);
  if (argument == "noise_aug_strength") return noise_aug_strength;
  if (argument == "min_guidance_scale") return min_guidance_scale;
  if (argument == "max_guidance_scale") return max_guidance_scale;
  throw bundle_error("the bundle uses the argument " + echoed(argument) +
                     ", which this library does not know; update it");
}

svd_trt_arguments default_arguments(const Manifest &manifest) {
  const auto number = [&](const char *name) { return manifest.arguments.at(name).default_number.value_or(0); };
  const auto whole = [&](const char *name) { return static_cast<int64_t>(number(name)); };
  svd_trt_arguments a{};
  a.size = sizeof a;
  a.num_frames = whole("num_frames");
  a.min_guidance_scale = number("min_guidance_scale");
  a.max_guidance_scale = number("max_guidance_scale");
  a.fps = whole("fps");
  a.motion_bucket_id = whole("motion_bucket_id");
  a.noise_aug_strength = number("noise_aug_strength");
  a.num_videos_per_prompt = whole("num_videos_per_prompt");
  a.height = whole("height");
  a.width = whole("width");
  return a;
}

Settings resolve(const svd_trt_arguments &given, const Manifest &manifest, size_t pictures) {
  Settings s{};
  choose_steps(s, given, manifest);
  check_limits("min_guidance_scale", given.min_guidance_scale, manifest);
  check_limits("max_guidance_scale", given.max_guidance_scale, manifest);
  check_limits("fps", given.fps, manifest);
  check_limits("motion_bucket_id", given.motion_bucket_id, manifest);
  check_limits("noise_aug_strength", given.noise_aug_strength, manifest);
  check_limits("num_videos_per_prompt", given.num_videos_per_prompt, manifest);
  if (given.decode_chunk_size != 0) check_limits("decode_chunk_size", given.decode_chunk_size, manifest);
  check_range("num_frames", given.num_frames, manifest.range("frames"), "--frames");
  check_side("height", given.height, manifest);
  check_side("width", given.width, manifest);
  s.num_frames = given.num_frames, s.height = given.height, s.width = given.width;
  s.min_guidance_scale = given.min_guidance_scale, s.max_guidance_scale = given.max_guidance_scale;
  s.guidance_shape = choice(given.guidance_shape, "guidance_shape", "linear", {"linear", "constant", "triangular"});
  s.fps = given.fps, s.motion_bucket_id = given.motion_bucket_id, s.noise_aug_strength = given.noise_aug_strength;
  check_deep_every(given.deep_every, manifest);
  s.deep_every = std::max<int64_t>(1, given.deep_every);
  s.num_videos_per_prompt = given.num_videos_per_prompt;
  s.resize_mode = choice(given.resize_mode, "resize_mode", "stretch", {"stretch", "crop", "pad"});
  s.resize = s.resize_mode == "crop"  ? ResizeMode::crop
             : s.resize_mode == "pad" ? ResizeMode::pad
                                      : ResizeMode::stretch;
  s.background = colour(given.background);

  s.videos = static_cast<int64_t>(pictures) * s.num_videos_per_prompt;
  s.seeds = seeds_of(given, s.videos);
  const double first = s.number(manifest.first_frame_scale), last = s.number(manifest.last_frame_scale);
  const double largest = s.guidance_shape == "constant" ? last : std::max(first, last);
  s.guided_steps = guided_steps(s.sigmas, largest > manifest.guidance_off_up_to, s.guidance_interval);
  check_branches(manifest.range("branches"), s.guided_steps);
  s.groups = groups_of(s.videos, manifest.range("batch"));
  s.picture_groups = groups_of(static_cast<int64_t>(pictures), manifest.range("pictures"));
  s.decode_chunk_size = given.decode_chunk_size != 0
                            ? given.decode_chunk_size
                            : default_chunk(manifest, s.num_frames, s.videos, s.height, s.width);
  s.chunks = chunk_sizes(s.videos * s.num_frames, s.decode_chunk_size, manifest.range("chunk"));
  return s;
}

} // namespace svd_trt::detail
