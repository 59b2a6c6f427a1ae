// Handles of the C interface: numbers that are looked up, so that a null, closed or invented one does no harm.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace svd_trt::detail {

template <class Value, class Handle> class Handles {
public:
  Handle *add(std::shared_ptr<Value> value) {
    const std::lock_guard<std::mutex> lock(mutex_);
    values_[++last_] = std::move(value);
    return reinterpret_cast<Handle *>(last_ * kStep + kKind);
  }

  // Null if the handle is not one that is open.
  std::shared_ptr<Value> find(Handle *handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = values_.find(key(handle));
    return found == values_.end() ? nullptr : found->second;
  }

  std::shared_ptr<Value> remove(Handle *handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = values_.find(key(handle));
    if (found == values_.end()) return nullptr;
    std::shared_ptr<Value> value = std::move(found->second);
    values_.erase(found);
    return value;
  }

private:
  static constexpr uintptr_t kStep = 16, kKind = Value::handle_kind; // no pointer of the host looks like this
  static uintptr_t key(Handle *handle) {
    const auto number = reinterpret_cast<uintptr_t>(handle);
    return number % kStep == kKind ? number / kStep : 0;
  }

  std::mutex mutex_;
  uintptr_t last_ = 0; // never used again, so that a closed handle stays closed
  std::unordered_map<uintptr_t, std::shared_ptr<Value>> values_;
};

} // namespace svd_trt::detail
