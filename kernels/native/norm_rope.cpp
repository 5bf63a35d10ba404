// Queries and keys: a norm over each head, and a rotation of its pairs. A block is a few tokens with all their heads.

#include "blocks.h"

namespace LEAP_ISA {
namespace {

// Room for the widest head.
constexpr int64_t WIDEST = 512;
static_assert(WIDEST % STEP == 0, "loops run over full steps");

template <int64_t LANES>
struct Lanes {
  typedef float Vector __attribute__((vector_size(LANES * 4)));
};

// Adds the halves of a vector until one number is left.
template <int64_t LANES>
inline float fold(typename Lanes<LANES>::Vector vector) {
  if constexpr (LANES == 2) {
    return vector[0] + vector[1];
  } else {
    typename Lanes<LANES / 2>::Vector half[2];
    std::memcpy(half, &vector, sizeof(vector));
    return fold<LANES / 2>(half[0] + half[1]);
  }
}

template <int64_t COUNT>
inline float fold(const Parts<Floats, COUNT>& x) {
  if constexpr (COUNT == 1) {
    return fold<REGISTER / 4>(x.part[0]);
  } else {
    return fold(each<COUNT / 2>([&](int64_t p) { return x.part[p] + x.part[p + COUNT / 2]; }));
  }
}

// Swaps neighbours.
inline Step swapped(const Step& x) {
  typedef uint64_t Pairs __attribute__((vector_size(REGISTER)));
  return each([&](int64_t p) {
    const Pairs pairs = bits<Pairs>(x.part[p]);
    return bits<Floats>((pairs >> 32) | (pairs << 32));
  });
}

enum class Pairing { none, interleaved, halves };

// Floats of a head, padded with zeros to full steps.
struct Head {
  float values[WIDEST] = {};

  Step at(int64_t i) const { return load<Float32>(values + i, Whole{}); }
  void set(int64_t i, const Step& value) { store<Float32>(values + i, value, Whole{}); }
};

struct Shape {
  int64_t width, steps_end;
  float eps;

  Shape(int64_t width_, float eps_) : width(width_), steps_end((width_ + STEP - 1) / STEP * STEP), eps(eps_) {}
};

// Calls body(i, extent) for the steps of a head.
template <class Body>
[[gnu::flatten]] inline void steps(const Shape& shape, Body body) {
  sweep(shape.width, false, body);
}

// The tables of a token for every element: x cos + partner sin.
struct Rotation {
  Head cos, sin;
  int64_t at = -1;

  void set(const float* cosine, const float* sine, int64_t half, Pairing pairing) {
    for (int64_t i = 0; i < half; ++i) {
      const int64_t first = pairing == Pairing::halves ? i : 2 * i;
      const int64_t second = pairing == Pairing::halves ? half + i : 2 * i + 1;
      cos.values[first] = cos.values[second] = cosine[i];
      sin.values[first] = -sine[i];
      sin.values[second] = sine[i];
    }
  }
};

inline float reciprocal_root(const Step& squares, const Shape& shape) {
  return 1.0f / __builtin_sqrtf(fold(squares) / static_cast<float>(shape.width) + shape.eps);
}

// Exchanges the halves of a head.
inline void exchange(const Head& from, Head& to, int64_t half) {
  const uint64_t bytes = static_cast<uint64_t>(half) * sizeof(float);
  std::memcpy(to.values, from.values + half, bytes);
  std::memcpy(to.values + half, from.values, bytes);
}

template <class T, Pairing PAIRING>
inline void forward(const typename T::Element* x, const Head& weight, const Rotation& rotation, Head& scratch,
                    Head& partner, typename T::Element* out, const Shape& shape) {
  Step squares{};
  steps(shape, [&](int64_t i, auto extent) {
    const Step value = load<T>(x + i, extent);
    squares = squares + value * value;
  });
  const float rstd = reciprocal_root(squares, shape);
  steps(shape, [&](int64_t i, auto extent) {
    const Step normed = load<T>(x + i, extent) * rstd * weight.at(i);
    if constexpr (PAIRING == Pairing::none) store<T>(out + i, normed, extent);
    if constexpr (PAIRING == Pairing::interleaved) {
      store<T>(out + i, normed * rotation.cos.at(i) + swapped(normed) * rotation.sin.at(i), extent);
    }
    if constexpr (PAIRING == Pairing::halves) scratch.set(i, normed);
  });
  if constexpr (PAIRING == Pairing::halves) {
    exchange(scratch, partner, shape.width / 2);
    steps(shape, [&](int64_t i, auto extent) {
      store<T>(out + i, scratch.at(i) * rotation.cos.at(i) + partner.at(i) * rotation.sin.at(i), extent);
    });
  }
}

// Scratch of a backward pass: the gradient, its partners, that at the norm times the weight, and times x.
struct Scratch {
  Head grad, partner, weighted, product;
};

template <class T, Pairing PAIRING, bool WEIGHT_WANTED>
inline void backward(const typename T::Element* grad, const typename T::Element* x, const Head& weight,
                     const Rotation& rotation, Scratch& scratch, typename T::Element* out, Head& at_weight,
                     const Shape& shape) {
  if constexpr (PAIRING == Pairing::halves) {
    steps(shape, [&](int64_t i, auto extent) { scratch.grad.set(i, load<T>(grad + i, extent)); });
    exchange(scratch.grad, scratch.partner, shape.width / 2);
  }
  Step squares{}, products{};
  steps(shape, [&](int64_t i, auto extent) {
    const Step value = load<T>(x + i, extent);
    squares = squares + value * value;
    Step at_norm;
    if constexpr (PAIRING == Pairing::none) at_norm = load<T>(grad + i, extent);
    if constexpr (PAIRING == Pairing::interleaved) {
      const Step here = load<T>(grad + i, extent);
      at_norm = here * rotation.cos.at(i) - swapped(here) * rotation.sin.at(i);
    }
    if constexpr (PAIRING == Pairing::halves) {
      at_norm = scratch.grad.at(i) * rotation.cos.at(i) - scratch.partner.at(i) * rotation.sin.at(i);
    }
    if constexpr (WEIGHT_WANTED) scratch.product.set(i, at_norm * value);
    const Step weighted = at_norm * weight.at(i);
    scratch.weighted.set(i, weighted);
    products = products + weighted * value;
  });
  const float rstd = reciprocal_root(squares, shape);
  const float share = rstd * rstd * (fold(products) / static_cast<float>(shape.width));
  steps(shape, [&](int64_t i, auto extent) {
    store<T>(out + i, (scratch.weighted.at(i) - load<T>(x + i, extent) * share) * rstd, extent);
    if constexpr (WEIGHT_WANTED) at_weight.set(i, at_weight.at(i) + scratch.product.at(i) * rstd);
  });
}

// How tokens are shared out. The blocks do not depend on the number of threads.
struct Tokens {
  int64_t count, of_block;
  int threads;

  Tokens(int64_t batch, int64_t tokens, int64_t of_token, int32_t most)
      : count(batch * tokens),
        of_block(larger(1, BLOCK / of_token)),
        threads(static_cast<int>(larger(1, smaller(most, count * of_token / ELEMENTS_PER_THREAD)))) {}

  int64_t blocks() const { return (count + of_block - 1) / of_block; }
};

Head weights(const float* weight, int64_t width) {
  Head head;
  for (int64_t i = 0; i < width; ++i) head.values[i] = weight == nullptr ? 1.0f : weight[i];
  return head;
}

// The sample and the token of a number. Where samples share tables, those of a token stand behind each other.
struct Place {
  int64_t sample, token;

  Place(const NormRope& call, int64_t number)
      : sample(call.table_batch == 0 ? number % call.batch : number / call.tokens),
        token(call.table_batch == 0 ? number / call.batch : number % call.tokens) {}
};

template <class T>
const typename T::Element* row(const Heads& heads, const Place& place) {
  return static_cast<const typename T::Element*>(heads.data) + place.sample * heads.batch + place.token * heads.token;
}

// Sets the rotation to that of a place, if it was not there already.
template <Pairing PAIRING>
void turn(Rotation& rotation, const NormRope& call, const Place& place) {
  if constexpr (PAIRING != Pairing::none) {
    const int64_t half = call.width / 2, at = place.sample * call.table_batch + place.token * half;
    if (rotation.at == at) return;
    rotation.at = at;
    rotation.set(call.cos + at, call.sin + at, half, PAIRING);
  }
}

template <class T, Pairing PAIRING>
int32_t forward_all(const NormRope& call) {
  const Shape shape(call.width, call.eps);
  const Tokens tokens(call.batch, call.tokens, call.heads * call.width, call.threads);
  auto* out = static_cast<typename T::Element*>(call.out);
#pragma omp parallel num_threads(tokens.threads) if (tokens.threads > 1)
  {
    const Head weight = weights(call.weight, call.width);
    Rotation rotation;
    Head scratch, partner;
#pragma omp for schedule(static) nowait
    for (int64_t number = 0; number < tokens.count; ++number) {
      const Place place(call, number);
      turn<PAIRING>(rotation, call, place);
      const auto* x = row<T>(call.x, place);
      auto* to = out + place.sample * call.out_batch + place.token * call.out_token;
      for (int64_t head = 0; head < call.heads; ++head) {
        forward<T, PAIRING>(x + head * call.x.head, weight, rotation, scratch, partner, to + head * call.width, shape);
      }
    }
  }
  return 0;
}

template <class T, Pairing PAIRING, bool WEIGHT_WANTED>
int32_t backward_all(const NormRope& call) {
  const Shape shape(call.width, call.eps);
  const Tokens tokens(call.batch, call.tokens, call.heads * call.width, call.threads);
  const int64_t blocks = tokens.blocks();
  const Sums sums(WEIGHT_WANTED ? blocks * call.width : 1);
  if (sums.get() == nullptr) return -2;
  auto* out = static_cast<typename T::Element*>(call.out);
#pragma omp parallel num_threads(tokens.threads) if (tokens.threads > 1)
  {
    const Head weight = weights(call.weight, call.width);
    Rotation rotation;
    Scratch scratch;
#pragma omp for schedule(static) nowait
    for (int64_t block = 0; block < blocks; ++block) {
      Head at_weight;
      const int64_t end = smaller(tokens.count, (block + 1) * tokens.of_block);
      for (int64_t number = block * tokens.of_block; number < end; ++number) {
        const Place place(call, number);
        turn<PAIRING>(rotation, call, place);
        const auto* grad = row<T>(call.grad, place);
        const auto* x = row<T>(call.x, place);
        auto* to = out + (place.sample * call.tokens + place.token) * call.heads * call.width;
        for (int64_t head = 0; head < call.heads; ++head) {
          backward<T, PAIRING, WEIGHT_WANTED>(grad + head * call.grad.head, x + head * call.x.head, weight, rotation,
                                              scratch, to + head * call.width, at_weight, shape);
        }
      }
      if constexpr (WEIGHT_WANTED) {
        for (int64_t i = 0; i < call.width; ++i) {
          sums.get()[block * call.width + i] = static_cast<double>(at_weight.values[i]);
        }
      }
    }
  }
  if constexpr (WEIGHT_WANTED) {
    for (int64_t i = 0; i < call.width; ++i) {
      double total = 0.0;
      for (int64_t block = 0; block < blocks; ++block) total += sums.get()[block * call.width + i];
      call.at_weight[i] = static_cast<float>(total);
    }
  }
  return 0;
}

template <class T, Pairing PAIRING>
int32_t run_as(const NormRope& call) {
  if (call.grad.data == nullptr) return forward_all<T, PAIRING>(call);
  if (call.at_weight == nullptr) return backward_all<T, PAIRING, false>(call);
  return backward_all<T, PAIRING, true>(call);
}

}  // namespace

int32_t run(const NormRope& call) {
  return with_dtypes(call.dtype, LEAP_FLOAT32, [&](auto type, auto) {
    using T = decltype(type);
    if (call.cos == nullptr) return run_as<T, Pairing::none>(call);
    if (call.halves != 0) return run_as<T, Pairing::halves>(call);
    return run_as<T, Pairing::interleaved>(call);
  });
}

}  // namespace LEAP_ISA
