// JSON of a bundle.
#pragma once

#include <string>

#include <nlohmann/json.hpp>

#include "error.hpp"

namespace svd_trt::detail {

// Parses `text`. Throws nlohmann::json::parse_error, and Failure (bundle) if values are nested so deeply that functions
// which follow them would use up the stack.
inline nlohmann::json parse_json(const std::string &text) {
  constexpr int deepest = 64; // a bundle needs 10
  return nlohmann::json::parse(text, [](int depth, nlohmann::json::parse_event_t, const nlohmann::json &) {
    if (depth > deepest) throw bundle_error("its JSON is nested more than " + std::to_string(deepest) + " deep");
    return true;
  });
}

} // namespace svd_trt::detail
