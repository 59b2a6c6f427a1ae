// Values in messages.
#pragma once

#include <algorithm>
#include <cstdio>
#include <string>
#include <string_view>

namespace svd_trt::detail {

inline std::string to_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

// The whole number with commas.
inline std::string with_commas(size_t value) {
  std::string text = std::to_string(value);
  for (size_t at = text.size(); at > 3;) text.insert(at -= 3, ",");
  return text;
}

// A long list of numbers by its start and its end.
inline std::string shortened(const std::string &text) {
  if (text.size() <= 300) return text;
  return text.substr(0, 80) + "… (" + with_commas(text.size()) + " characters) …" + text.substr(text.size() - 40);
}

inline std::string first_line(std::string_view text) { return std::string(text.substr(0, text.find('\n'))); }

// Bytes of the character of UTF-8 that `text` begins with; 0 if it begins with none.
inline size_t character_length(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  const size_t length = lead < 0x80 ? 1 : lead >= 0xc2 && lead < 0xe0 ? 2 : lead >= 0xe0 && lead < 0xf0 ? 3 : 4;
  if ((lead >= 0x80 && lead < 0xc2) || lead > 0xf4 || length > text.size()) return 0;
  for (size_t i = 1; i < length; ++i)
    if (byte(i) < 0x80 || byte(i) > 0xbf) return 0;
  const unsigned char second = length > 1 ? byte(1) : 0;
  const bool overlong = (lead == 0xe0 && second < 0xa0) || (lead == 0xf0 && second < 0x90);
  const bool no_character = (lead == 0xed && second > 0x9f) || (lead == 0xf4 && second > 0x8f);
  return overlong || no_character ? 0 : length;
}

// Writes `text` as one line of UTF-8 and its final zero to `room` bytes: whole characters only, and '?' for control
// characters and for bytes that are no UTF-8. It allocates nothing.
inline void write_line(std::string_view text, char *to, size_t room) {
  size_t written = 0;
  while (!text.empty()) {
    const size_t length = character_length(text);
    if (written + std::max<size_t>(length, 1) >= room) break;
    const auto first = static_cast<unsigned char>(text[0]);
    const bool unprintable = length == 0 || first < 32 || first == 127;
    std::copy_n(unprintable ? "?" : text.data(), std::max<size_t>(length, 1), to + written);
    written += std::max<size_t>(length, 1);
    text.remove_prefix(std::max<size_t>(length, 1));
  }
  to[written] = 0;
}

// The caller's text in quotes, shortened, with unprintable bytes replaced.
inline std::string echoed(const std::string &text) {
  char shown[61];
  write_line(text, shown, sizeof shown);
  return std::string("'") + shown + (text.size() >= sizeof shown ? "..." : "") + "'";
}

} // namespace svd_trt::detail
