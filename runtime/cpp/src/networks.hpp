// The networks in ONNX Runtime, loaded when they are first used.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "ort.hpp"

namespace svd_trt::detail {

struct DeviceOptions {
  std::string provider = "cpu"; // "cpu", "cuda", "tensorrt", "tensorrt-rtx"
  std::string library;          // plugin of "tensorrt-rtx"
  int device = 0;
  int threads = 0; // 0: all that the process may use
  void *stream = nullptr;
};

// Ends runs from another thread. It cannot be used again.
class Cancellation {
public:
  void cancel(const std::string &reason);
  bool cancelled() const { return cancelled_; }
  // Throws Failure (cancelled).
  void check() const;
  const Ort::RunOptions &options() const { return options_; }

private:
  std::atomic<bool> cancelled_{false};
  mutable std::mutex mutex_;
  std::string reason_;
  Ort::RunOptions options_;
};

// A tensor that the host can read and write.
template <class T> struct HostTensor {
  std::vector<int64_t> shape;
  std::vector<T> data;

  HostTensor() = default;
  explicit HostTensor(std::vector<int64_t> dimensions) : shape(std::move(dimensions)), data(elements(shape)) {}
};

// One network, which several threads may run at the same time.
class Session {
public:
  Session(const Bundle &bundle, const std::string &name, const DeviceOptions &options,
          std::shared_ptr<Environment> env);

  const Network &spec() const { return spec_; }
  Ort::IoBinding binding() { return Ort::IoBinding(session_); }

  // Memory of the device that the network computes on, undefined content. It must not outlive the session.
  Ort::Value empty(const std::vector<int64_t> &shape, Type type);

  // Throws Failure (backend, cancelled).
  void run(Ort::IoBinding &binding, const Cancellation &cancellation);

private:
  const Network &spec_;
  std::string name_;
  std::shared_ptr<Environment> env_;
  Ort::Session session_{nullptr};
  Ort::MemoryInfo memory_{nullptr};
  std::unique_ptr<Ort::Allocator> allocator_; // null on the CPU
  std::mutex allocating_;
};

class Networks {
public:
  // Throws Failure (argument, backend).
  Networks(const Bundle &bundle, DeviceOptions options);

  std::shared_ptr<Session> get(const std::string &name);
  void release();
  bool on_gpu() const { return options_.provider != "cpu"; }

private:
  const Bundle &bundle_;
  DeviceOptions options_;
  std::shared_ptr<Environment> env_;
  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<Session>> sessions_;
};

} // namespace svd_trt::detail
