// Values in messages.
#pragma once

#include <cstdio>
#include <string>

namespace svd_trt::detail {

inline std::string to_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

// The caller's text in quotes, shortened, with unprintable bytes replaced.
inline std::string echoed(const std::string &text) {
  constexpr size_t most = 60;
  std::string shown = text.substr(0, most);
  for (char &c : shown)
    if (static_cast<unsigned char>(c) < 32 || c == 127) c = '?';
  return "'" + shown + (text.size() > most ? "..." : "") + "'";
}

} // namespace svd_trt::detail
