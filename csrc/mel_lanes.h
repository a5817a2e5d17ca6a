// The log-mel of a group of frames, one frame in each lane of a vector. Included by each file that
// defines a vector for an instruction set, inside its anonymous namespace:
//
//   V            kLanes floats, with + - *
//   load, store, broadcast, divide, multiply_add (a b + c), multiply_subtract (a b - c)
//   at_least(x, bound)         the larger of the two; NaN stays NaN
//   split(x, exponent)         m in [sqrt(1/2), sqrt(2)) with x = m 2^exponent; x positive and normal
//   transpose(block)           of kLanes vectors
//   load_transposed(p, stride, block)  of the vectors at p + l * stride; block[i] has the i-th of each
//   prefetch(p)                fetches a line of 64 bytes into the cache; any address will do
//   load_int16(p)              kLanes samples as floats

constexpr float kPreemphasis = 0.97f;

struct Complex {
  V re, im;
};

inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
inline Complex operator*(Complex a, Complex b) {
  return {multiply_subtract(a.re, b.re, a.im * b.im), multiply_add(a.re, b.im, a.im * b.re)};
}
inline Complex plus_i_times(Complex a, Complex b) { return {a.re - b.im, a.im + b.re}; }
inline Complex minus_i_times(Complex a, Complex b) { return {a.re + b.im, a.im - b.re}; }

// Not int, whose overflow Python's builds define (-fwrapv): addresses would take a tenth of the time.
using Index = std::ptrdiff_t;

inline Complex load(const float* z, Index index) {
  return {load(z + 2 * index * kLanes), load(z + (2 * index + 1) * kLanes)};
}
inline void store(float* z, Index index, Complex value) {
  store(z + 2 * index * kLanes, value.re);
  store(z + (2 * index + 1) * kLanes, value.im);
}
inline Complex broadcast(Root root) { return {broadcast(root.re), broadcast(root.im)}; }

// The mean of each frame's win_length samples.
inline V mean(const MelTables& t, const float* samples) {
  V rows[kLanes] = {};  // short sums: the rounding of the mean would show in the lowest bins
  Index n = 0;
  for (; n + kLanes <= t.win_length; n += kLanes) {
    for (Index l = 0; l < kLanes; ++l) rows[l] = rows[l] + load(samples + l * t.hop_length + n);
  }
  transpose(rows);
  for (; n < t.win_length; ++n) {
    float rest[kLanes];
    for (Index l = 0; l < kLanes; ++l) rest[l] = samples[l * t.hop_length + n];
    rows[n % kLanes] = rows[n % kLanes] + load(rest);
  }
  for (Index step = kLanes / 2; step > 0; step /= 2) {
    for (Index i = 0; i < step; ++i) rows[i] = rows[i] + rows[i + step];
  }
  return divide(rows[0], broadcast(static_cast<float>(t.win_length)));
}

// The frames as the transform takes them, [n_fft][lanes]: windowed, and zeros behind; kaldi: less
// their mean, and pre-emphasised.
template <bool kKaldi>
inline void gather(const MelTables& t, const float* samples, float* out) {
  const V centre = kKaldi ? mean(t, samples) : V{};
  const V preemphasis = broadcast(-kPreemphasis);
  const Index length = t.win_length, hop = t.hop_length;  // stores could change those in the tables
  const float* window = t.window;
  V before{};  // of sample 0, which the symmetric Hann window hides
  for (Index n = 0; n < length; n += kLanes) {
    V block[kLanes];
    load_transposed(samples + n, hop, block);
    for (Index i = 0; i < kLanes; ++i) {
      if (kKaldi) {
        const V centred = block[i] - centre;
        block[i] = multiply_add(preemphasis, before, centred);
        before = centred;
      }
      block[i] = block[i] * broadcast(window[n + i]);
    }
    for (Index i = 0; i < kLanes; ++i) store(out + (n + i) * kLanes, block[i]);
  }
  for (Index n = length; n < t.n_fft; ++n) store(out + n * kLanes, V{});
}

// Decimation in frequency, in place: `size` complex values, a power of two; radix 4, after one pass
// of radix 2 where that leaves a factor of 2. Results come in digit-reversed order (MelTables::slots).
// With each butterfly a line at `next` is fetched, as its arithmetic leaves the memory idle.
inline void transform(const Root* roots, Index num_roots, Index size, std::uintptr_t next, float* z) {
  Index length = size;
  bool odd = false;
  for (Index n = size; n > 1; n /= 2) odd = !odd;
  if (odd) {
    length = size / 2;
    for (Index j = 0; j < length; ++j) {
      const Complex a = load(z, j), b = load(z, j + length);
      store(z, j, a + b);
      store(z, j + length, (a - b) * broadcast(roots[j * (num_roots / size)]));
    }
  }
  for (; length > 1; length /= 4) {
    const Index quarter = length / 4, stride = num_roots / length;
    for (Index j = 0; j < quarter; ++j) {
      const Complex w1 = broadcast(roots[j * stride]), w2 = broadcast(roots[2 * j * stride]),
                    w3 = broadcast(roots[3 * j * stride]);
      for (Index k = j; k < size; k += length) {
        const Complex x0 = load(z, k), x1 = load(z, k + quarter), x2 = load(z, k + 2 * quarter),
                      x3 = load(z, k + 3 * quarter);
        prefetch(reinterpret_cast<const char*>(next));
        next += 64;
        const Complex a = x0 + x2, b = x0 - x2, c = x1 + x3, d = x1 - x3;
        store(z, k, a + c);
        if (j == 0) {
          store(z, k + quarter, minus_i_times(b, d));
          store(z, k + 2 * quarter, a - c);
          store(z, k + 3 * quarter, plus_i_times(b, d));
        } else {
          store(z, k + quarter, minus_i_times(b, d) * w1);
          store(z, k + 2 * quarter, (a - c) * w2);
          store(z, k + 3 * quarter, plus_i_times(b, d) * w3);
        }
      }
    }
  }
}

// 4 times the power of each bin of a real signal x, in place: z[n] = x[2n] + i x[2n + 1] has been
// transformed. X[k] and X[n_fft / 2 - k] come from the same two values.
inline void power(const MelTables& t, float* z) {
  const Index half = t.n_fft / 2;
  const int* slots = t.slots;
  const Root* roots = t.roots;
  const V two = broadcast(2.0f);
  const Complex first = load(z, 0);
  const V constant = two * (first.re + first.im), highest = two * (first.re - first.im);
  store(z + slots[0] * kLanes, constant * constant);
  store(z + slots[half] * kLanes, highest * highest);
  for (Index k = 1; k <= half / 2; ++k) {
    float* low = z + slots[k] * kLanes;
    float* high = z + slots[half - k] * kLanes;
    const Complex p = load(low, 0), q = load(high, 0);
    const Complex even = {p.re + q.re, p.im - q.im};
    const Complex odd = Complex{p.re - q.re, p.im + q.im} * broadcast(roots[k]);
    const Complex x = minus_i_times(even, odd), y = plus_i_times(even, odd);
    store(low, multiply_add(x.re, x.re, x.im * x.im));
    store(high, multiply_add(y.re, y.re, y.im * y.im));
  }
}

// ln(x) to 1 ulp, x positive and normal; NaN and infinity give NaN. With x = m 2^e and f = m - 1:
// ln(x) = e ln2 + f - f^2 / 2 + f^3 p(f), p minimax for the relative error (6e-9).
inline V natural_log(V x) {
  constexpr float kP[] = {0.3333333f,   -0.25000823f, 0.20001227f, -0.16623357f,
                          0.14201762f, -0.13160194f, 0.1276155f,  -0.0763443f};
  V exponent;
  const V f = split(x, exponent) - broadcast(1.0f);
  const V square = f * f;
  V p = broadcast(kP[7]);
  for (int i = 6; i >= 0; --i) p = multiply_add(p, f, broadcast(kP[i]));
  // ln2 in two parts, of which the product with an exponent is exact in the first.
  V rest = multiply_add(exponent, broadcast(-2.12194440e-4f), square * f * p);
  rest = multiply_add(square, broadcast(-0.5f), rest);
  return multiply_add(exponent, broadcast(0.693359375f), f + rest) + (x - x);
}

inline V normalised_log(const MelTables& t, V mel) {
  const V log = natural_log(at_least(mel, broadcast(t.floor)));
  return (log - broadcast(t.mean)) * broadcast(t.scale);
}

inline V filtered(const MelFilter& filter, const float* z) {
  V sums[kTaps] = {};
  for (const MelTap* tap = filter.begin; tap != filter.end; tap += kTaps) {
    for (int i = 0; i < kTaps; ++i) {
      sums[i] = multiply_add(broadcast(tap[i].weight), load(z + tap[i].slot * kLanes), sums[i]);
    }
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

inline void log_mel(const MelTables& t, const float* samples, int frames, std::int64_t first_row,
                    int rows, const void* next, float* scratch, float* patches) {
  if (frames > 0) {
    if (t.kaldi) {
      gather<true>(t, samples, scratch);
    } else {
      gather<false>(t, samples, scratch);
    }
    transform(t.roots, t.n_fft, t.n_fft / 2, reinterpret_cast<std::uintptr_t>(next), scratch);
    power(t, scratch);
  }
  const MelFilter* filters = t.filters;  // all that the loops need: stores could change the tables
  const int n_mels = t.n_mels, patch_time = t.patch_time, patch_freq = t.patch_freq;
  const bool whole = patch_freq % kLanes == 0;
  const std::int64_t patch_dim = std::int64_t{patch_time} * patch_freq;
  const std::int64_t column_dim = n_mels / patch_freq * patch_dim;
  float* starts[kLanes];
  std::int64_t column = first_row / patch_time, frame = first_row % patch_time;
  for (int l = 0; l < rows; ++l) {
    starts[l] = patches + column * column_dim + frame * patch_freq;
    if (++frame == patch_time) frame = 0, ++column;
  }
  const V silence = normalised_log(t, V{});
  for (int m = 0; m < n_mels; m += kLanes) {
    V block[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const bool computed = frames > 0 && m + i < n_mels;
      block[i] = computed ? normalised_log(t, filtered(filters[m + i], scratch)) : silence;
    }
    transpose(block);
    const std::int64_t offset = m / patch_freq * patch_dim + m % patch_freq;
    for (int l = 0; l < rows; ++l) {
      const V values = l < frames ? block[l] : silence;
      if (whole) {
        store(starts[l] + offset, values);
        continue;
      }
      float out[kLanes];
      store(out, values);
      for (int i = 0; i < kLanes && m + i < n_mels; ++i) {
        starts[l][(m + i) / patch_freq * patch_dim + (m + i) % patch_freq] = out[i];
      }
    }
  }
}

inline void from_int16(const std::int16_t* samples, std::int64_t count, float* out) {
  constexpr float kScale = 1.0f / 32768;
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(out + i, load_int16(samples + i) * broadcast(kScale));
  }
  for (; i < count; ++i) out[i] = static_cast<float>(samples[i]) * kScale;
}
