#pragma once

#include <cstdint>
#include <vector>

namespace slap_fast {

// Bin b holds indices[offsets[b]] .. indices[offsets[b + 1] - 1], in the order of placement.
struct Bins {
  std::vector<std::int64_t> indices;
  std::vector<std::int64_t> offsets;
};

// First-fit decreasing: the longest item first, equal lengths by index, each into the first bin
// with room. Bins come in the order of opening, so the result is a function of the input alone.
// O(n log n). Throws std::invalid_argument for a length below 0 or above max_tokens.
Bins pack(const std::vector<std::int64_t>& lengths, std::int64_t max_tokens);

}  // namespace slap_fast
