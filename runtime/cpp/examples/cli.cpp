// svd_trt_cli: makes videos with a bundle, as `svd-trt infer` does.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <thread>

#include "cli_options.hpp"
#include "video_file.hpp"

#ifndef _WIN32
#include <unistd.h>
#endif

namespace {

volatile std::sig_atomic_t interrupted = 0; // the signal
volatile std::sig_atomic_t cancellable = 0; // a stream is being made, and a thread cancels it

// Nothing cancels the hashing of a bundle or the self-test, and neither leaves anything behind.
void on_signal(int signal) {
  interrupted = signal;
  if (cancellable) return;
#ifndef _WIN32
  constexpr char message[] = "interrupted\n";
  if (write(2, message, sizeof message - 1) < 0) std::_Exit(128 + signal);
#endif
  std::_Exit(128 + signal);
}

std::string numbered(const std::string &path, int64_t index, int64_t count) {
  if (count == 1 || path == "-") return path;
  const size_t slash = path.find_last_of('/'), dot = path.find_last_of('.');
  const bool suffix = dot != std::string::npos && (slash == std::string::npos || dot > slash + 1);
  const std::string stem = suffix ? path.substr(0, dot) : path;
  std::string number = std::to_string(index); // padded, so that names sort
  number.insert(0, std::to_string(count - 1).size() - number.size(), '0');
  return stem + "-" + number + (suffix ? path.substr(dot) : "");
}

// Throws std::runtime_error: an output would replace an input, or is inside the bundle.
void check_outputs(const CliOptions &options) {
  namespace fs = std::filesystem;
  if (options.output == "-") return;
  const int64_t count = videos_of(options);
  const fs::path bundle = fs::weakly_canonical(options.bundle);
  for (int64_t video = 0; video < count; ++video) {
    const std::string path = numbered(options.output, video, count);
    const fs::path target = fs::weakly_canonical(path);
    if (std::mismatch(bundle.begin(), bundle.end(), target.begin(), target.end()).first == bundle.end())
      throw std::runtime_error(path + " is inside the bundle, which the next build replaces; choose another output");
    for (const std::string &picture : options.pictures)
      if (fs::weakly_canonical(picture) == target)
        throw std::runtime_error(path + " is also an input picture; choose another output");
  }
}

std::string rate_text(FrameRate rate) {
  return std::to_string(rate.numerator) + (rate.denominator == 1 ? "" : "/" + std::to_string(rate.denominator));
}

std::string seeds_text(const std::vector<uint64_t> &seeds) {
  std::string text = seeds.size() > 1 ? "seeds " : "seed ";
  for (size_t i = 0; i < seeds.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(seeds[i]);
  return text;
}

int self_test(svd_trt::Pipeline &pipeline) {
  bool passed = true;
  for (const svd_trt::Check &check : pipeline.self_test()) {
    std::printf("%-24s %-12.3g allowed %-12.3g %s\n", check.name.c_str(), check.difference, check.allowed,
                check.passed() ? "ok" : "WRONG");
    passed = passed && check.passed();
  }
  return passed ? 0 : 1;
}

void show(const std::string &stage, int64_t done, int64_t total) {
#ifndef _WIN32
  static const bool terminal = isatty(2) != 0;
#else
  static const bool terminal = false;
#endif
  if (terminal)
    std::fprintf(stderr, "\r%s %lld/%lld   ", stage.c_str(), static_cast<long long>(done),
                 static_cast<long long>(total));
  if (terminal && done == total) std::fprintf(stderr, "\n");
}

void make_videos(svd_trt::Pipeline &pipeline, const CliOptions &options) {
  std::vector<PpmPicture> pictures;
  std::vector<svd_trt::Picture> views;
  for (const std::string &path : options.pictures) pictures.push_back(read_ppm(path));
  for (const PpmPicture &picture : pictures) views.push_back(picture.view());
  svd_trt::StreamOptions stream_options;
  if (!options.quiet) stream_options.progress = show;
  svd_trt::Stream stream = pipeline.stream(views, options.arguments, stream_options);
  const svd_trt::Settings settings = stream.settings();
  const FrameRate rate = options.output_fps.value_or(FrameRate{settings.fps, 1});

  // A signal handler may only set a flag, so a thread waits for it.
  cancellable = 1;
  std::atomic<bool> finished{false};
  std::thread watcher([&] {
    while (!finished) {
      if (interrupted) stream.cancel();
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
  });
  struct Stop {
    std::atomic<bool> &finished;
    std::thread &watcher;
    ~Stop() {
      finished = true;
      watcher.join();
    }
  } stop{finished, watcher};

  svd_trt::Frame frame{};
  for (int64_t video = 0; video < stream.videos(); ++video) {
    const std::string path = numbered(options.output, video, stream.videos());
    VideoFile file(path, options.format == "y4m", settings.width, settings.height, rate);
    for (int64_t i = 0; i < settings.num_frames && stream.next(frame); ++i) file.write(frame);
    file.finish();
    if (!options.quiet)
      std::fprintf(stderr, "wrote %s: %lld frames of %lldx%lld at %s fps, %s\n",
                   path == "-" ? "standard output" : path.c_str(), static_cast<long long>(settings.num_frames),
                   static_cast<long long>(settings.width), static_cast<long long>(settings.height),
                   rate_text(rate).c_str(), seeds_text(settings.seeds).c_str());
  }
}

} // namespace

int main(int argc, char **argv) {
  try {
    const CliOptions options = parse_command_line({argv + 1, argv + argc});
    if (options.help || options.version) {
      std::printf("%s%s", options.help ? kUsage : svd_trt_version(), options.help ? "" : "\n");
      return 0;
    }
    if (!options.self_test) check_outputs(options);
    std::signal(SIGINT, on_signal);
    std::signal(SIGTERM, on_signal);
    svd_trt::Pipeline pipeline(options.bundle, options.open);
    if (options.self_test) return self_test(pipeline);
    make_videos(pipeline, options);
    return 0;
  } catch (const UsageError &error) {
    std::fprintf(stderr, "svd_trt_cli: %s; svd_trt_cli --help shows all options\n", error.what());
    return 2;
  } catch (const svd_trt::Cancelled &) {
    std::fprintf(stderr, "interrupted\n");
    return 128 + interrupted;
  } catch (const std::exception &error) {
    std::fprintf(stderr, "svd_trt_cli: %s\n", error.what());
    return 1;
  }
}
