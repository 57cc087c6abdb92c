// exp_constants.h: the constants of exp and tanh in fp32, the same on every instruction set.
//
//   n = round(x / ln 2),  r = x - n ln 2,  exp x = 2^n (1 + r + r^2 (c2 + ... c6 r^4))
//
// Error below 1.1 ulp for x in [-12, 12]. An fma knows n ln 2 to n 1.9e-9, which makes 4.5 ulp at
// -87 and 88: a sixteenth of what x itself is rounded by there. Where the CPU has no fma r takes
// two steps, and the error is 1.2 ulp throughout. The polynomial is minimax, 3e-9 on |r| <= ln 2 /
// 2 (fitted by linear programming). Degree 5 would be a fifteenth faster and off by 2 ulp.
//
// exp 0 is exactly 1. Below kExpLow the answer is exactly 0, so that a masked token (-inf) has no
// weight at all, and no subnormal number is ever made: those cost more than a hundred cycles each.
#pragma once

namespace fdpg::cpu {

inline constexpr float kExpLow = -87.0f;
// Above, the exponent would leave its 8 bits. AVX-512 needs no such care: its scale instruction
// overflows to infinity, and the polynomial, being of even degree, is positive for any r.
inline constexpr float kExpHigh = 88.0f;
// Added and subtracted, it rounds to the nearest integer; added, it leaves n in the low bits.
inline constexpr float kShifter = 0x1.8p23f;
inline constexpr float kLog2E = 0x1.715476p0f;
inline constexpr float kLn2 = 0x1.62e43p-1f;
// In two parts; the first has 9 bits, so its product with n is exact, with or without fma.
inline constexpr float kLn2High = 0x1.63p-1f;
inline constexpr float kLn2Low = -0x1.bd0106p-13f;
inline constexpr float kExp2 = 0x1.fffffcp-2f;
inline constexpr float kExp3 = 0x1.555492p-3f;
inline constexpr float kExp4 = 0x1.5558f2p-5f;
inline constexpr float kExp5 = 0x1.123a2p-7f;
inline constexpr float kExp6 = 0x1.6a23dp-10f;

// tanh, made of the same (logits-inl.h), is 1 in fp32 from here on: 1 - tanh 9.02 is 2^-25.
inline constexpr float kTanhOne = 10.0f;

}  // namespace fdpg::cpu
