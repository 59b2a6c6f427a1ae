// What the handles of the C interface stand for.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "generation.hpp"
#include "providers.hpp"

namespace svd_trt::detail {

// A generation, and texts that its settings point to.
struct Stream {
  static constexpr uintptr_t handle_kind = 9;
  std::unique_ptr<Generation> generation;
  std::vector<double> sigmas;
  std::string background;
};

class Pipeline {
public:
  static constexpr uintptr_t handle_kind = 5;

  // Throws Failure.
  Pipeline(const std::string &path, const DeviceOptions &options, bool verify);
  ~Pipeline() { cancel("the pipeline was closed"); }
  Pipeline(const Pipeline &) = delete;
  Pipeline &operator=(const Pipeline &) = delete;

  const std::shared_ptr<const Shared> &shared() const { return shared_; }
  const Manifest &manifest() const { return shared_->bundle.manifest; }

  std::shared_ptr<Stream> open(Settings settings, std::vector<Picture> pictures, std::vector<float> latents,
                               bool frames_on_device, Progress progress);
  void cancel(const std::string &reason);

private:
  std::shared_ptr<const Shared> shared_;
  std::mutex mutex_;
  std::vector<std::weak_ptr<Stream>> streams_;
};

} // namespace svd_trt::detail
