// What an operator in C++ expects of its arguments: where it is not so, Python gets a ValueError.
#pragma once

#include <sstream>
#include <stdexcept>

template <class... Parts>
void expect(bool fits, const Parts&... message) {
  if (fits) return;
  std::ostringstream text;
  (text << ... << message);
  throw std::invalid_argument(text.str());
}
