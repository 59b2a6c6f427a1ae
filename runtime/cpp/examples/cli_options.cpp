#include "cli_options.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <numeric>

const char *const kUsage = R"(usage: svd_trt_cli BUNDLE PICTURE.ppm... -o OUT [options]
       svd_trt_cli BUNDLE --self-test

Makes a video from each picture, a binary PPM. OUT is a file, or - for standard output.

  -o, --output OUT              several videos become OUT-0, OUT-1, ... before the suffix
  --format raw|y4m              packed RGB, or YUV4MPEG2 4:4:4 that ffmpeg reads without options
                                [default: y4m if OUT ends in .y4m, else raw]
  --output-fps RATE             frames a second of the y4m alone, such as 24000/1001; the motion stays that of --fps
  --num-frames N                --num-inference-steps N       --sigmas 700,100,10,1,0
  --min-guidance-scale X        --max-guidance-scale X        --fps N
  --guidance-interval LOW,HIGH  --guidance-shape linear|constant|triangular
  --motion-bucket-id N          --noise-aug-strength X        --decode-chunk-size N
  --num-videos-per-prompt N     --seed N or one for each video: 1,2,3
  --height N
  --width N                     --sampler NAME                --resize-mode stretch|crop|pad
  --schedule karras|exponential|ays                           --quality best|standard|fast|draft
  --background #RRGGBB          --deep-every N
  --provider cpu|cuda|tensorrt|tensorrt-rtx                   --provider-library FILE
  --device cpu|cuda|cuda:N      --threads N                   --no-verify
  --self-test                   compare with the bundle's golden values
  -q, --quiet                   -h, --help                    --version
)";

namespace {

template <class Number, class Convert>
Number number(const std::string &name, const std::string &text, Convert convert) {
  size_t used = 0;
  Number value{};
  try {
    value = convert(text, &used);
  } catch (const std::exception &) {
    used = 0;
  }
  if (used == 0 || used != text.size()) throw UsageError(name + " takes a number, not '" + text + "'");
  return value;
}

// What is between commas.
std::vector<std::string> split(const std::string &text) {
  std::vector<std::string> parts;
  for (size_t start = 0; start <= text.size();) {
    const size_t end = std::min(text.find(',', start), text.size());
    parts.push_back(text.substr(start, end - start));
    start = end + 1;
  }
  return parts;
}

int64_t whole(const std::string &name, const std::string &text) {
  return number<int64_t>(name, text, [](const std::string &t, size_t *used) { return std::stoll(t, used); });
}

double real(const std::string &name, const std::string &text) {
  return number<double>(name, text, [](const std::string &t, size_t *used) { return std::stod(t, used); });
}

uint64_t seed(const std::string &name, const std::string &text) {
  if (text.find('-') != std::string::npos) throw UsageError(name + " is from 0 to 2**64 - 1, not " + text);
  return number<uint64_t>(name, text, [](const std::string &t, size_t *used) { return std::stoull(t, used); });
}

void set_seeds(svd_trt::Arguments &to, const std::string &name, const std::string &text) {
  const std::vector<std::string> parts = split(text);
  to.seed.reset(), to.seeds.reset(); // the last one counts
  if (parts.size() == 1) {
    to.seed = seed(name, text);
  } else {
    to.seeds.emplace();
    for (const std::string &part : parts) to.seeds->push_back(seed(name, part));
  }
}

// 12, 23.976 or 24000/1001, as the nearest fraction in use.
FrameRate rate(const std::string &name, const std::string &text) {
  const UsageError refusal(name + " is a frame rate from 0.01 to 1000, such as 12, 23.976 or 24000/1001, not '" + text +
                           "'");
  const auto check = [&](double value) {
    if (!(value >= 0.01 && value <= 1000)) throw refusal;
  };
  if (const size_t slash = text.find('/'); slash != std::string::npos) {
    const int64_t above = whole(name, text.substr(0, slash)), below = whole(name, text.substr(slash + 1));
    if (above < 1 || below < 1 || below > 1000000) throw refusal;
    check(static_cast<double>(above) / static_cast<double>(below));
    const int64_t common = std::gcd(above, below);
    return {above / common, below / common};
  }
  const double value = real(name, text);
  check(value);
  FrameRate nearest{0, 1};
  double least = std::numeric_limits<double>::infinity();
  for (int64_t below = 1; below <= 1001; ++below) { // the largest denominator in use, that of NTSC
    const auto above = static_cast<double>(std::llround(value * static_cast<double>(below)));
    const double difference = std::fabs(above / static_cast<double>(below) - value);
    if (difference < least) least = difference, nearest = {static_cast<int64_t>(above), below};
  }
  return nearest;
}

int32_t small(const std::string &name, const std::string &text) {
  const int64_t value = whole(name, text);
  if (value < 0 || value > std::numeric_limits<int32_t>::max()) throw UsageError(name + " cannot be " + text);
  return static_cast<int32_t>(value);
}

std::vector<double> numbers(const std::string &name, const std::string &text) {
  std::vector<double> values;
  for (const std::string &part : split(text)) values.push_back(real(name, part));
  return values;
}

std::array<double, 2> two_numbers(const std::string &name, const std::string &text) {
  const std::vector<double> values = numbers(name, text);
  if (values.size() != 2) throw UsageError(name + " takes two numbers such as 0,50, not '" + text + "'");
  return {values[0], values[1]};
}

void set_device(svd_trt::OpenOptions &open, const std::string &text) {
  if (text == "cpu") return;
  if (text != "cuda" && text.rfind("cuda:", 0) != 0)
    throw UsageError("--device is cpu, cuda or cuda:N, not '" + text + "'");
  open.device = text == "cuda" ? 0 : small("--device", text.substr(5));
  if (open.provider == "cpu") open.provider = "cuda";
}

using Setter = std::function<void(const std::string &name, const std::string &text)>;

// Options that take a value.
std::map<std::string, Setter> setters(CliOptions &o, std::string &device) {
  const auto integer = [](std::optional<int64_t> &to) {
    return [&to](const std::string &name, const std::string &text) { to = whole(name, text); };
  };
  const auto decimal = [](std::optional<double> &to) {
    return [&to](const std::string &name, const std::string &text) { to = real(name, text); };
  };
  const auto word = [](auto &to) { return [&to](const std::string &, const std::string &text) { to = text; }; };
  svd_trt::Arguments &a = o.arguments;
  return {
      {"--output", word(o.output)},
      {"--format", word(o.format)},
      {"--num-frames", integer(a.num_frames)},
      {"--num-inference-steps", integer(a.num_inference_steps)},
      {"--sigmas", [&a](const std::string &name, const std::string &text) { a.sigmas = numbers(name, text); }},
      {"--min-guidance-scale", decimal(a.min_guidance_scale)},
      {"--max-guidance-scale", decimal(a.max_guidance_scale)},
      {"--guidance-shape", word(a.guidance_shape)},
      {"--guidance-interval",
       [&a](const std::string &name, const std::string &text) { a.guidance_interval = two_numbers(name, text); }},
      {"--fps", integer(a.fps)},
      {"--motion-bucket-id", integer(a.motion_bucket_id)},
      {"--noise-aug-strength", decimal(a.noise_aug_strength)},
      {"--decode-chunk-size", integer(a.decode_chunk_size)},
      {"--deep-every", integer(a.deep_every)},
      {"--num-videos-per-prompt", integer(a.num_videos_per_prompt)},
      {"--seed", [&a](const std::string &name, const std::string &text) { set_seeds(a, name, text); }},
      {"--output-fps", [&o](const std::string &name, const std::string &text) { o.output_fps = rate(name, text); }},
      {"--icc",
       [](const std::string &name, const std::string &) {
         throw UsageError(name + " is for pictures with a colour profile, and a PPM has none; leave it out");
       }},
      {"--height", integer(a.height)},
      {"--width", integer(a.width)},
      {"--schedule", word(a.schedule)},
      {"--sampler", word(a.sampler)},
      {"--quality", word(a.quality)},
      {"--resize-mode", word(a.resize_mode)},
      {"--background", word(a.background)},
      {"--provider", word(o.open.provider)},
      {"--provider-library", word(o.open.provider_library)},
      {"--device", word(device)},
      {"--threads", [&o](const std::string &name, const std::string &text) { o.open.threads = small(name, text); }},
  };
}

void check(const CliOptions &o) {
  if (o.bundle.empty()) throw UsageError("name a bundle");
  if (o.self_test) return;
  if (o.pictures.empty()) throw UsageError("name a picture");
  if (o.output.empty()) throw UsageError("name an output with -o");
  if (o.format != "raw" && o.format != "y4m") throw UsageError("--format is raw or y4m, not '" + o.format + "'");
  if (o.output == "-" && o.format == "y4m" && videos_of(o) > 1) // a second header would follow
    throw UsageError("standard output takes " + std::to_string(videos_of(o)) +
                     " videos one after the other only as --format raw; name a file with -o");
}

} // namespace

int64_t videos_of(const CliOptions &options) {
  const auto of_each = std::clamp<int64_t>(options.arguments.num_videos_per_prompt.value_or(1), 1, 1000);
  return static_cast<int64_t>(options.pictures.size()) * of_each;
}

CliOptions parse_command_line(const std::vector<std::string> &arguments) {
  CliOptions o;
  std::string device = "cpu";
  const std::map<std::string, Setter> with_value = setters(o, device);
  const std::map<std::string, bool *> flags{
      {"--self-test", &o.self_test}, {"--quiet", &o.quiet}, {"--help", &o.help}, {"--version", &o.version}};
  const std::map<std::string, std::string> short_names{{"-o", "--output"}, {"-q", "--quiet"}, {"-h", "--help"}};
  for (size_t i = 0; i < arguments.size(); ++i) {
    std::string name = arguments[i], value;
    if (const auto found = short_names.find(name); found != short_names.end()) name = found->second;
    const size_t equals = name.rfind("--", 0) == 0 ? name.find('=') : std::string::npos;
    if (equals != std::string::npos) value = name.substr(equals + 1), name.resize(equals);
    if (const auto flag = flags.find(name); flag != flags.end() && equals == std::string::npos) {
      *flag->second = true;
    } else if (name == "--no-verify") {
      o.open.verify = false;
    } else if (const auto setter = with_value.find(name); setter != with_value.end()) {
      if (equals == std::string::npos) {
        if (i + 1 == arguments.size()) throw UsageError(name + " takes a value");
        value = arguments[++i];
      }
      setter->second(name, value);
    } else if (name.size() > 1 && name[0] == '-') {
      throw UsageError("there is no option " + name);
    } else if (o.bundle.empty()) {
      o.bundle = name;
    } else {
      o.pictures.push_back(name);
    }
  }
  set_device(o.open, device);
  const bool y4m = o.output.size() > 4 && o.output.compare(o.output.size() - 4, 4, ".y4m") == 0;
  if (o.format.empty()) o.format = y4m ? "y4m" : "raw";
  if (!o.help && !o.version) check(o);
  return o;
}
