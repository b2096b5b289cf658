// Instructions of a whole warp: shuffles, votes, ldmatrix and stmatrix, mma.sync; and 16-bit numbers.

#pragma once

#include <math.h>

#include "memory.h"

namespace simt {

// ------------------------------------------------------------------ 16-bit numbers

static float widen_slowly(uint16_t x, bool brain) {
  if (brain) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }
  _Float16 value;
  memcpy(&value, &x, 2);
  return value;
}
struct Widened {
  float of[2][1 << 16];
  Widened() {
    for (int brain = 0; brain < 2; brain++)
      for (int x = 0; x < 1 << 16; x++) of[brain][x] = widen_slowly(x, brain);
  }
};
float widen(uint16_t x, bool brain) {
  static const Widened widened;
  return widened.of[brain][x];
}
// Two e4m3, the bytes of a word.
void widen_e4m3(float& a, float& b, uint32_t pair) {
  float* to[] = {&a, &b};
  for (int i = 0; i < 2; i++) {
    uint32_t x = pair >> 8 * i & 0xff, exponent = x >> 3 & 15, mantissa = x & 7;
    float value = exponent ? ldexpf(8 + mantissa, int(exponent) - 10) : ldexpf(mantissa, -9);
    if ((x & 0x7f) == 0x7f) value = NAN;
    *to[i] = x & 0x80 ? -value : value;
  }
}
void widen_halves(float& a, float& b, uint32_t x, uint32_t y) {
  a = widen(x & 0xffff, false) * widen(y & 0xffff, false);
  b = widen(x >> 16, false) * widen(y >> 16, false);
}
void widen_int8(float& a, float& b, float& c, float& d, uint32_t word) {
  float* to[] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; i++) *to[i] = int8_t(word >> 8 * i & 0xff);
}
static uint16_t narrow(float x, bool brain) {
  uint16_t bits;
  if (brain) {
    uint32_t all;
    memcpy(&all, &x, 4);
    return x != x ? 0x7fff : (all + 0x7fff + (all >> 16 & 1)) >> 16;
  }
  _Float16 value = x;
  memcpy(&bits, &value, 2);
  return bits;
}
uint32_t pack(float high, float low, bool brain) {
  return uint32_t(narrow(high, brain)) << 16 | narrow(low, brain);
}

// ------------------------------------------------------------------ instructions of a warp

uint64_t exchange(uint64_t value, int source) {
  memcpy(self().in + 1, &value, 8);
  self().in[0] = source;
  together([](Thread* warp) {
    for (int l = 0; l < kWarp; l++) memcpy(warp[l].out, warp[warp[l].in[0]].in + 1, 8);
  });
  memcpy(&value, self().out, 8);
  return value;
}

int any(int predicate) {
  self().in[0] = predicate != 0;
  together([](Thread* warp) {
    uint32_t result = 0;
    for (int l = 0; l < kWarp; l++) result |= warp[l].in[0];
    for (int l = 0; l < kWarp; l++) warp[l].out[0] = result;
  });
  return self().out[0];
}

uint32_t ballot(int predicate) {
  self().in[0] = predicate != 0;
  together([](Thread* warp) {
    uint32_t result = 0;
    for (int l = 0; l < kWarp; l++) result |= warp[l].in[0] << l;
    for (int l = 0; l < kWarp; l++) warp[l].out[0] = result;
  });
  return self().out[0];
}

void ldmatrix(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t from, bool transposed) {
  self().in[0] = from;
  check_shared(from, kChunk, kChunk, "ldmatrix");
  self().in[1] = transposed;
  together([](Thread* warp) {
    for (int m = 0; m < 4; m++)
      for (int l = 0; l < kWarp; l++) {
        uint16_t pair[2];
        for (int e = 0; e < 2; e++) {
          int row = l / 4, column = l % 4 * 2 + e;
          if (warp[0].in[1]) std::swap(row, column);
          memcpy(&pair[e], at(warp[m * 8 + row].in[0]) + column * 2, 2);
        }
        memcpy(&warp[l].out[m], pair, 4);
      }
  });
  a = self().out[0], b = self().out[1], c = self().out[2], d = self().out[3];
}

// An 8 x 8 matrix of 16-bit elements, a row's pair a lane, the other way round.
uint32_t movmatrix(uint32_t pair) {
  self().in[0] = pair;
  together([](Thread* warp) {
    for (int l = 0; l < kWarp; l++) {
      warp[l].out[0] = 0;
      for (int e = 0; e < 2; e++) {
        int row = l % 4 * 2 + e, column = l / 4;
        uint16_t value = warp[row * 4 + column / 2].in[0] >> (column % 2 * 16);
        warp[l].out[0] |= uint32_t(value) << (16 * e);
      }
    }
  });
  return self().out[0];
}

// ``matrices`` of 8 x 8, row r of matrix m at the address that lane 8 m + r brings.
void stmatrix(uint32_t to, std::initializer_list<uint32_t> registers, bool transposed) {
  Thread& me = self();
  me.in[0] = to, me.in[1] = transposed, me.in[2] = registers.size();
  std::copy(registers.begin(), registers.end(), me.in + 3);
  together([](Thread* warp) {
    int first = int(warp - block->threads.data()), matrices = warp[0].in[2];
    for (int i = 0; i < matrices * 8; i++) {
      check_shared(warp[i].in[0], kChunk, kChunk, "stmatrix");
      unfenced->wrote(first + i, warp[i].in[0], kChunk);
    }
    for (int m = 0; m < matrices; m++)
      for (int l = 0; l < kWarp; l++)
        for (int e = 0; e < 2; e++) {
          int row = l / 4, column = l % 4 * 2 + e;
          if (warp[0].in[1]) std::swap(row, column);
          uint16_t value = warp[l].in[3 + m] >> (16 * e);
          memcpy(at(warp[m * 8 + row].in[0]) + column * 2, &value, 2);
        }
  });
}

static float element(const uint32_t* registers, int i, bool brain) {
  return widen(uint16_t(registers[i / 2] >> (i % 2 * 16)), brain);
}

// D = A B + C of m16n8kK: row l / 4 (+ 8) and columns l % 4 * 2 (+ 1) of A's registers and of C; PTX ISA, "mma".
template <int K>
void mma_m16n8(float* d, const uint32_t* a, const uint32_t* b, bool brain) {
  Thread& me = self();
  memcpy(me.in, a, K / 4 * 4), memcpy(me.in + 4, b, K / 8 * 4), memcpy(me.in + 6, d, 16);
  static bool kind;
  kind = brain;
  together([](Thread* warp) {
    static float A[16][K], B[K][8];
    for (int l = 0; l < kWarp; l++) {
      for (int i = 0; i < K / 2; i++) A[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i % 2 + i / 4 * 8] = element(warp[l].in, i, kind);
      for (int i = 0; i < K / 4; i++) B[l % 4 * 2 + i % 2 + i / 2 * 8][l / 4] = element(warp[l].in + 4, i, kind);
    }
    for (int l = 0; l < kWarp; l++)
      for (int i = 0; i < 4; i++) {
        // As on Hopper, the order of the products doesn't matter: they are added before the sum is rounded.
        float c;
        memcpy(&c, &warp[l].in[6 + i], 4);
        double sum = 0;
        for (int k = 0; k < K; k++) sum += (double)A[l / 4 + i / 2 * 8][k] * B[k][l % 4 * 2 + i % 2];
        c = (float)(c + sum);
        memcpy(&warp[l].out[i], &c, 4);
      }
  });
  memcpy(d, me.out, 16);
}

template void mma_m16n8<8>(float*, const uint32_t*, const uint32_t*, bool);
template void mma_m16n8<16>(float*, const uint32_t*, const uint32_t*, bool);

// Volta's m8n8k4 with float32 C: four products, one for each quad pair (lanes q * 4 .. + 3 and 16 more).
void mma_m8n8k4(float* d, const uint32_t* a, const uint32_t* b, bool b_is_row) {
  Thread& me = self();
  memcpy(me.in, a, 8), memcpy(me.in + 2, b, 8), memcpy(me.in + 4, d, 32);
  static bool row;
  row = b_is_row;
  together([](Thread* warp) {
    for (int q = 0; q < 4; q++) {
      float A[8][4], B[4][8];
      auto lane_of = [&](int i) { return q * 4 + i % 4 + i / 4 * 16; };  // i-th of the eight lanes of a quad pair
      for (int i = 0; i < 8; i++)
        for (int j = 0; j < 4; j++) {
          A[i][j] = element(warp[lane_of(i)].in, j, false);
          float x = element(warp[lane_of(i)].in + 2, j, false);
          if (row)
            B[i % 4][j + i / 4 * 4] = x;
          else
            B[j][i] = x;
        }
      for (int i = 0; i < 8; i++)
        for (int x = 0; x < 8; x++) {
          int l = lane_of(i);
          int r = (l & 1) + (x & 2) + (l >= 16 ? 4 : 0), c = (x & 4) + (l & 2) + (x & 1);
          float sum;
          memcpy(&sum, &warp[l].in[4 + x], 4);
          for (int k = 0; k < 4; k++) sum += A[r][k] * B[k][c];
          memcpy(&warp[l].out[x], &sum, 4);
        }
    }
  });
  memcpy(d, me.out, 32);
}

}  // namespace simt
