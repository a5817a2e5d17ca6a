// The log-mel of a group of frames, one frame in each lane of a vector. Included by each file that
// defines a vector for an instruction set, inside its anonymous namespace:
//
//   V            kLanes floats, with + - *
//   load, store, broadcast, divide, multiply_add (a b + c), multiply_subtract (a b - c)
//   at_least(x, bound)         the larger of the two; NaN stays NaN
//   split(x, exponent)         m in [sqrt(1/2), sqrt(2)) with x = m 2^exponent; x positive and normal
//   transpose(block)           of kLanes vectors
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

inline Complex load(const float* z, int index) {
  return {load(z + 2 * index * kLanes), load(z + (2 * index + 1) * kLanes)};
}
inline void store(float* z, int index, Complex value) {
  store(z + 2 * index * kLanes, value.re);
  store(z + (2 * index + 1) * kLanes, value.im);
}
inline Complex broadcast(Root root) { return {broadcast(root.re), broadcast(root.im)}; }

// Samples as [win_length][lanes]; returns their sum by lane.
inline V gather(const MelTables& t, const float* samples, int frames, float* out) {
  const float* starts[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    starts[l] = samples + std::int64_t{l < frames ? l : frames - 1} * t.hop_length;
  }
  V sums[4] = {};  // short sums: the rounding of the mean would show in the lowest bins
  for (int n = 0; n < t.win_length; n += kLanes) {
    V block[kLanes];
    for (int l = 0; l < kLanes; ++l) block[l] = load(starts[l] + n);
    transpose(block);
    V partial{};
    for (int i = 0; i < kLanes && n + i < t.win_length; ++i) {
      store(out + (n + i) * kLanes, block[i]);
      partial = partial + block[i];
    }
    V& sum = sums[n / kLanes % 4];
    sum = sum + partial;
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Kaldi's removal of the mean and pre-emphasis, and the window; zeros up to n_fft. From the last
// sample down, as each needs the one before it as it was.
inline void apply_window(const MelTables& t, V sum, float* frame) {
  for (int n = t.win_length; n < t.n_fft; ++n) store(frame + n * kLanes, V{});
  if (!t.kaldi) {
    for (int n = 0; n < t.win_length; ++n) {
      store(frame + n * kLanes, load(frame + n * kLanes) * broadcast(t.window[n]));
    }
    return;
  }
  const V mean = divide(sum, broadcast(static_cast<float>(t.win_length)));
  const V preemphasis = broadcast(-kPreemphasis);
  V centred = load(frame + (t.win_length - 1) * kLanes) - mean;
  for (int n = t.win_length - 1; n > 0; --n) {
    const V before = load(frame + (n - 1) * kLanes) - mean;
    store(frame + n * kLanes, multiply_add(preemphasis, before, centred) * broadcast(t.window[n]));
    centred = before;
  }
  store(frame, V{});  // the symmetric Hann window is 0 there
}

// Decimation in frequency, in place: `size` complex values, a power of two; radix 4, after one pass
// of radix 2 where that leaves a factor of 2. Results come in digit-reversed order (MelTables::slots).
inline void transform(const Root* roots, int num_roots, int size, float* z) {
  int length = size;
  bool odd = false;
  for (int n = size; n > 1; n /= 2) odd = !odd;
  if (odd) {
    length = size / 2;
    for (int j = 0; j < length; ++j) {
      const Complex a = load(z, j), b = load(z, j + length);
      store(z, j, a + b);
      store(z, j + length, (a - b) * broadcast(roots[j * (num_roots / size)]));
    }
  }
  for (; length > 1; length /= 4) {
    const int quarter = length / 4, stride = num_roots / length;
    for (int j = 0; j < quarter; ++j) {
      const Complex w1 = broadcast(roots[j * stride]), w2 = broadcast(roots[2 * j * stride]),
                    w3 = broadcast(roots[3 * j * stride]);
      for (int k = j; k < size; k += length) {
        const Complex x0 = load(z, k), x1 = load(z, k + quarter), x2 = load(z, k + 2 * quarter),
                      x3 = load(z, k + 3 * quarter);
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
  const int half = t.n_fft / 2;
  const V two = broadcast(2.0f);
  const Complex first = load(z, 0);
  const V constant = two * (first.re + first.im), highest = two * (first.re - first.im);
  store(z + t.slots[0] * kLanes, constant * constant);
  store(z + t.slots[half] * kLanes, highest * highest);
  for (int k = 1; k <= half / 2; ++k) {
    float* low = z + t.slots[k] * kLanes;
    float* high = z + t.slots[half - k] * kLanes;
    const Complex p = load(low, 0), q = load(high, 0);
    const Complex even = {p.re + q.re, p.im - q.im};
    const Complex odd = Complex{p.re - q.re, p.im + q.im} * broadcast(t.roots[k]);
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

inline V filtered(const MelTables& t, int m, const float* z) {
  const MelFilter& filter = t.filters[m];
  V sum{};
  for (int i = 0; i < filter.count; ++i) {
    const V bin = load(z + t.slots[filter.first + i] * kLanes);
    sum = multiply_add(broadcast(filter.weights[i]), bin, sum);
  }
  return sum;
}

inline void log_mel(const MelTables& t, const float* samples, int frames, std::int64_t first_row,
                    int rows, float* scratch, float* patches) {
  if (frames > 0) {
    const V sum = gather(t, samples, frames, scratch);
    apply_window(t, sum, scratch);
    transform(t.roots, t.n_fft, t.n_fft / 2, scratch);
    power(t, scratch);
  }
  const std::int64_t patch_dim = std::int64_t{t.patch_time} * t.patch_freq;
  const std::int64_t column_dim = t.n_mels / t.patch_freq * patch_dim;
  float* starts[kLanes];
  for (int l = 0; l < rows; ++l) {
    const std::int64_t row = first_row + l;
    starts[l] = patches + row / t.patch_time * column_dim + row % t.patch_time * t.patch_freq;
  }
  const V silence = normalised_log(t, V{});
  for (int m = 0; m < t.n_mels; m += kLanes) {
    V block[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const bool computed = frames > 0 && m + i < t.n_mels;
      block[i] = computed ? normalised_log(t, filtered(t, m + i, scratch)) : silence;
    }
    transpose(block);
    for (int l = 0; l < rows; ++l) {
      const V values = l < frames ? block[l] : silence;
      if (t.patch_freq % kLanes == 0) {
        store(starts[l] + m / t.patch_freq * patch_dim + m % t.patch_freq, values);
        continue;
      }
      float out[kLanes];
      store(out, values);
      for (int i = 0; i < kLanes && m + i < t.n_mels; ++i) {
        starts[l][(m + i) / t.patch_freq * patch_dim + (m + i) % t.patch_freq] = out[i];
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
