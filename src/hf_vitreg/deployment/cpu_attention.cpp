// Copyright 2026 The ViTReg team. All rights reserved.
// Licensed under the Apache License, Version 2.0.
//
// softmax(Q K^T * scale) V on a CPU, block by block: no more of the attention matrix is written than fits a core's
// cache (online softmax, Milakov and Gimelshein, 2018; FlashAttention, Dao et al., 2022).
//
// A task is some queries of one head of one image. It packs a block of keys, transposed, and of values, multiplies
// with registers full of partial sums, and exponentiates in place. Vectors are those of GCC and Clang, so that the
// same lines serve AVX2, AVX-512 and NEON; bfloat16 is multiplied as such where AVX512-BF16 is, else as float.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, WIDTH = 4, HEIGHT = 6;  // 24 of 32 registers hold sums
#elif defined(__AVX__)
constexpr int LANES = 8, WIDTH = 2, HEIGHT = 6;  // 12 of 16
#else
constexpr int LANES = 4, WIDTH = 4, HEIGHT = 6;  // 24 of 32
#endif
constexpr int64_t PANEL = LANES * WIDTH;  // columns that are summed at a time

constexpr int64_t MAX_KEYS = 512;  // in a block
constexpr int64_t MAX_LOGITS = 128 * 1024;  // of a task, 512 kB
constexpr float NOTHING = -1e30f;  // a logit that has no part in a softmax

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t bfloat16;

inline Floats load(const float* from) {
  Floats to;
  std::memcpy(&to, from, sizeof to);
  return to;
}
inline void store(float* to, Floats from) { std::memcpy(to, &from, sizeof from); }
inline int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
inline int64_t up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

inline float to_float(float value) { return value; }
inline float to_float(bfloat16 value) {
  uint32_t bits = uint32_t(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline void from_float(float& to, float value) { to = value; }
inline void from_float(bfloat16& to, float value) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to = bfloat16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// 2^x with a relative error of 1e-7: a polynomial for the fraction, the whole part goes into the exponent.
inline Floats exp2(Floats x) {
  x = x < -126.f ? Floats{} - 126.f : x;
  const Floats magic = Floats{} + 12582912.f;  // 1.5 * 2^23: what is added to it is rounded
  Floats rounded = x + magic;
  Ints exponent;
  std::memcpy(&exponent, &rounded, sizeof exponent);
  Floats f = x - (rounded - magic);
  Floats p = 1.5403530e-4f * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.f;
  Ints bits;
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

// How the factors of a product are kept. Depth is packed `STEP` at a time.
struct AsFloat {
  typedef float Value;
  static constexpr int STEP = 1;
  static inline Floats multiply_add(const float* left, const float* right, Floats sum) {
    return *left * load(right) + sum;
  }
};

#if defined(__AVX512BF16__)
struct AsBfloat16 {
  typedef bfloat16 Value;
  static constexpr int STEP = 2;
  static inline Floats multiply_add(const bfloat16* left, const bfloat16* right, Floats sum) {
    int32_t pair;
    std::memcpy(&pair, left, sizeof pair);
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair),
                                    (__m512bh)_mm512_loadu_si512(right));
  }
};
#else
typedef AsFloat AsBfloat16;
#endif

// sums[rows][PANEL] (+)= left[rows][depth] * right[depth][PANEL]; right is packed by STEP.
template <class Factor, int ROWS, int WIDTH>
inline void multiply_panel(const typename Factor::Value* left, int64_t left_stride,
                           const typename Factor::Value* right, float* sums, int64_t sums_stride, int64_t depth,
                           bool add) {
  Floats sum[ROWS][WIDTH];
  for (int r = 0; r < ROWS; r++)
    for (int w = 0; w < WIDTH; w++) sum[r][w] = add ? load(sums + r * sums_stride + w * LANES) : Floats{};
  for (int64_t k = 0; k < depth; k += Factor::STEP, right += WIDTH * LANES * Factor::STEP)
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int w = 0; w < WIDTH; w++)
        sum[r][w] = Factor::multiply_add(left + r * left_stride + k, right + w * LANES * Factor::STEP, sum[r][w]);
  for (int r = 0; r < ROWS; r++)
    for (int w = 0; w < WIDTH; w++) store(sums + r * sums_stride + w * LANES, sum[r][w]);
}

template <class Factor, int WIDTH>
void multiply_rows(const typename Factor::Value* left, int64_t left_stride, const typename Factor::Value* right,
                   float* sums, int64_t sums_stride, int64_t rows, int64_t depth, bool add) {
  int64_t row = 0;
  for (; row + HEIGHT <= rows; row += HEIGHT)
    multiply_panel<Factor, HEIGHT, WIDTH>(left + row * left_stride, left_stride, right, sums + row * sums_stride,
                                          sums_stride, depth, add);
  for (; row < rows; row++)
    multiply_panel<Factor, 1, WIDTH>(left + row * left_stride, left_stride, right, sums + row * sums_stride,
                                     sums_stride, depth, add);
}

// Columns of `right` lie in panels of PANEL, the last of which may be narrower by whole vectors.
template <class Factor>
void multiply(const typename Factor::Value* left, int64_t left_stride, const typename Factor::Value* right,
              int64_t cols, float* sums, int64_t rows, int64_t depth, bool add) {
  for (int64_t col = 0; col < cols; col += PANEL) {
    const typename Factor::Value* panel = right + col * up(depth, Factor::STEP);
    switch (std::min(PANEL, cols - col) / LANES) {
      case 1: multiply_rows<Factor, 1>(left, left_stride, panel, sums + col, cols, rows, depth, add); break;
      case 2: multiply_rows<Factor, 2>(left, left_stride, panel, sums + col, cols, rows, depth, add); break;
      case 3: multiply_rows<Factor, 3>(left, left_stride, panel, sums + col, cols, rows, depth, add); break;
      default: multiply_rows<Factor, WIDTH>(left, left_stride, panel, sums + col, cols, rows, depth, add);
    }
  }
}

struct Heads {  // of queries, keys, values or outputs, (batch, heads, tokens, head_dim); channels lie together
  void* data;
  int64_t batch, head, token;
};

// A thread's memory, kept from call to call: fresh pages cost as much as some of the arithmetic.
template <class Value>
struct Scratch {
  std::vector<Value> queries, keys, values, probabilities;
  std::vector<float> logits, sums, largest, total;

  void reserve(int64_t num_queries, int64_t num_keys, int64_t head_dim) {
    int64_t keys_padded = up(num_keys, LANES), depth = up(head_dim, 2), cols = up(head_dim, LANES);
    grow(queries, num_queries * depth);
    grow(keys, keys_padded * depth);
    grow(values, keys_padded * cols);
    grow(probabilities, num_queries * keys_padded);
    grow(logits, num_queries * keys_padded);
    grow(sums, num_queries * cols);
    grow(largest, num_queries);
    grow(total, num_queries);
  }

  template <class Any>
  static void grow(std::vector<Any>& vector, int64_t size) {
    if (int64_t(vector.size()) < size) vector.resize(size);
  }
};

template <class Element, class Factor>
struct Task {
  typedef typename Factor::Value Value;
  int64_t head_dim, cols;
  std::vector<Value>&queries, &keys, &values, &probabilities;
  std::vector<float>&logits, &sums, &largest, &total;

  Task(int64_t head_dim, Scratch<Value>& scratch)
      : head_dim(head_dim), cols(up(head_dim, LANES)), queries(scratch.queries), keys(scratch.keys),
        values(scratch.values), probabilities(scratch.probabilities), logits(scratch.logits), sums(scratch.sums),
        largest(scratch.largest), total(scratch.total) {}

  static inline void convert(const Element* from, Value& to) {
    if constexpr (sizeof(Element) == sizeof(Value))
      to = *from;
    else
      to = to_float(*from);
  }

  void pack_queries(const Element* from, int64_t stride, int64_t number) {
    for (int64_t i = 0; i < number; i++)
      for (int64_t d = 0; d < up(head_dim, 2); d++) {
        Value& to = queries[i * up(head_dim, 2) + d];
        if (d < head_dim) convert(from + i * stride + d, to);
        else to = Value(0);
      }
  }

  // [keys][head_dim] -> [keys / PANEL][head_dim / STEP][PANEL][STEP]; what pads a panel is 0
  void pack_keys(const Element* from, int64_t stride, int64_t number) {
    constexpr int STEP = Factor::STEP;
    for (int64_t first = 0; first < number; first += PANEL) {
      Value* panel = keys.data() + first * up(head_dim, STEP);
      int64_t filled = std::min(PANEL, number - first), width = up(filled, LANES);
      if (filled < width || head_dim % STEP) std::fill(panel, panel + width * up(head_dim, STEP), Value(0));
      for (int64_t d = 0; d < head_dim; d += STEP)
        for (int64_t j = 0; j < filled; j++)
          for (int s = 0; s < STEP && d + s < head_dim; s++)
            convert(from + (first + j) * stride + d + s, panel[(d / STEP * width + j) * STEP + s]);
    }
  }

  // [keys][head_dim] -> [head_dim / PANEL][keys / STEP][PANEL][STEP]
  void pack_values(const Element* from, int64_t stride, int64_t number) {
    constexpr int STEP = Factor::STEP;
    int64_t depth = up(number, STEP);
    for (int64_t first = 0; first < head_dim; first += PANEL) {
      Value* panel = values.data() + first * depth;
      int64_t filled = std::min(PANEL, head_dim - first), width = up(filled, LANES);
      if (filled < width || depth > number) std::fill(panel, panel + width * depth, Value(0));
      for (int64_t j = 0; j < number; j += STEP) {
        const Element* row = from + j * stride + first;
        Value* to = panel + j * width;
        if (j + STEP > number) {
          for (int64_t d = 0; d < filled; d++) convert(row + d, to[d * STEP]);
          continue;
        }
        for (int64_t d = 0; d < filled; d++)
          for (int s = 0; s < STEP; s++) convert(row + s * stride + d, to[d * STEP + s]);
      }
    }
  }

  // Logits of a row become probabilities, up to the row's sum; what was summed before is scaled down to the same.
  void exponentiate(int64_t row, int64_t number, int64_t width, float scale, bool first) {
    float* logit = logits.data() + row * width;
    std::fill(logit + number, logit + width, NOTHING);
    Floats highest = load(logit);
    for (int64_t j = LANES; j < width; j += LANES) {
      Floats other = load(logit + j);
      highest = other > highest ? other : highest;
    }
    float before = first ? NOTHING : largest[row], high = before;
    for (int lane = 0; lane < LANES; lane++) high = std::max(high, highest[lane] * scale);
    Floats sum = {};
    for (int64_t j = 0; j < width; j += LANES) {
      Floats power = exp2(load(logit + j) * scale - high);
      sum += power;
      store(logit + j, power);
    }
    float row_sum = 0;
    for (int lane = 0; lane < LANES; lane++) row_sum += sum[lane];
    largest[row] = high;
    if (first) {
      total[row] = row_sum;
      return;
    }
    const float shrink = exp2(Floats{} + (before - high))[0];
    total[row] = total[row] * shrink + row_sum;
    for (int64_t d = 0; d < cols; d += LANES)
      store(sums.data() + row * cols + d, load(sums.data() + row * cols + d) * shrink);
  }

  const Value* rounded(int64_t queries_here, int64_t width) {
    if constexpr (Factor::STEP == 1) return logits.data();
#if defined(__AVX512BF16__)
    else {
      for (int64_t i = 0; i < queries_here * width; i += LANES) {
        __m256bh some = _mm512_cvtneps_pbh((__m512)load(logits.data() + i));
        std::memcpy(probabilities.data() + i, &some, sizeof some);
      }
      return probabilities.data();
    }
#endif
  }

  void run(const Element* q, int64_t q_stride, const Element* k, int64_t k_stride, const Element* v, int64_t v_stride,
           Element* out, int64_t out_stride, int64_t queries_here, int64_t tokens, int64_t keys_a_block, float scale) {
    pack_queries(q, q_stride, queries_here);
    for (int64_t first = 0; first < tokens; first += keys_a_block) {
      int64_t number = std::min(keys_a_block, tokens - first), width = up(number, LANES);
      pack_keys(k + first * k_stride, k_stride, number);
      multiply<Factor>(queries.data(), up(head_dim, 2), keys.data(), width, logits.data(), queries_here, head_dim,
                       false);
      for (int64_t row = 0; row < queries_here; row++) exponentiate(row, number, width, scale, first == 0);
      pack_values(v + first * v_stride, v_stride, number);
      multiply<Factor>(rounded(queries_here, width), width, values.data(), cols, sums.data(), queries_here, number,
                       first > 0);
    }
    for (int64_t row = 0; row < queries_here; row++) {
      float factor = 1.f / total[row];
      for (int64_t d = 0; d < head_dim; d++) from_float(out[row * out_stride + d], sums[row * cols + d] * factor);
    }
  }
};

template <class Element, class Factor>
void attention(const Heads* heads, int64_t batch, int64_t num_heads, int64_t tokens, int64_t head_dim, float scale,
               int64_t threads) {
  int64_t keys_a_block = up(ceil_div(tokens, ceil_div(tokens, MAX_KEYS)), 2);
  // where there are few images a head is cut, so that every core has work
  int64_t at_most = MAX_LOGITS / up(keys_a_block, LANES);
  int64_t wanted = std::max(ceil_div(tokens, at_most), ceil_div(4 * threads, batch * num_heads));
  int64_t queries_a_task = up(ceil_div(tokens, wanted), HEIGHT);
  int64_t chunks = ceil_div(tokens, queries_a_task);
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch<typename Factor::Value> scratch;
    scratch.reserve(queries_a_task, keys_a_block, head_dim);
    Task<Element, Factor> task(head_dim, scratch);
#pragma omp for schedule(dynamic)
    for (int64_t index = 0; index < batch * num_heads * chunks; index++) {
      int64_t image = index / chunks / num_heads, head = index / chunks % num_heads;
      int64_t first = index % chunks * queries_a_task;
      Element* at[4];
      for (int i = 0; i < 4; i++)
        at[i] = (Element*)heads[i].data + image * heads[i].batch + head * heads[i].head;
      task.run(at[0] + first * heads[0].token, heads[0].token, at[1], heads[1].token, at[2], heads[2].token,
               at[3] + first * heads[3].token, heads[3].token, std::min(queries_a_task, tokens - first), tokens,
               keys_a_block, scale);
    }
  }
}

}  // namespace

// `heads` are queries, keys, values and outputs. `scale` is that of powers of two: the usual one times log2(e).
extern "C" void attention_float32(const Heads* heads, int64_t batch, int64_t num_heads, int64_t tokens,
                                  int64_t head_dim, float scale, int64_t threads) {
  attention<float, AsFloat>(heads, batch, num_heads, tokens, head_dim, scale, threads);
}

extern "C" void attention_bfloat16(const Heads* heads, int64_t batch, int64_t num_heads, int64_t tokens,
                                   int64_t head_dim, float scale, int64_t threads) {
  attention<bfloat16, AsBfloat16>(heads, batch, num_heads, tokens, head_dim, scale, threads);
}
