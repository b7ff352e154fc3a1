/* Greedy text of a legacy .bin and its tokenizer file, by the rules that src/llama2c.py tells of run.c.

       cc -O2 tests/llama2c_reader.c -o reader -lm && ./reader MODEL.bin MODEL.tokenizer.bin TOKENS [PROMPT]

   Written for the tests from the format alone: one function per step, no cache tricks, no speed. */

#include <ctype.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int32_t head_of[7];
enum { DIM, HIDDEN, LAYERS, HEADS, KV, VOCAB, CONTEXT };
static float *all;
static char **piece;
static float *score;
static int vocab;

static void *slurp(const char *path, long *size) {
    FILE *f = fopen(path, "rb");
    if (!f) { perror(path); exit(1); }
    fseek(f, 0, SEEK_END);
    *size = ftell(f);
    rewind(f);
    char *data = malloc(*size + 1);
    if (fread(data, 1, *size, f) != (size_t)*size) exit(1);
    fclose(f);
    return data;
}

static void read_pieces(const char *path) {
    long size;
    char *data = slurp(path, &size), *at = data + 4;
    piece = calloc(vocab, sizeof *piece);
    score = calloc(vocab, sizeof *score);
    for (int i = 0; i < vocab; i++) {
        int32_t n;
        memcpy(&score[i], at, 4);
        memcpy(&n, at + 4, 4);
        piece[i] = calloc(n + 1, 1);
        memcpy(piece[i], at + 8, n);
        at += 8 + n;
    }
    if (at != data + size) { fprintf(stderr, "the tokenizer has another size\n"); exit(1); }
}

static int find(const char *text) {
    for (int i = 0; i < vocab; i++)
        if (!strcmp(piece[i], text)) return i;
    return -1;
}

static int encode(const char *prompt, int *ids) {
    int n = 0;
    ids[n++] = 1;
    if (!*prompt) return n;
    ids[n++] = find(" ");
    for (const char *c = prompt; *c;) {
        char one[8] = {0};
        int size = 1;
        while ((c[size] & 0xC0) == 0x80) size++;
        memcpy(one, c, size);
        int id = find(one);
        if (id >= 0) ids[n++] = id;
        else for (int k = 0; k < size; k++) ids[n++] = (unsigned char)c[k] + 3;
        c += size;
    }
    for (;;) {
        int best = -1, where = 0;
        for (int i = 0; i + 1 < n; i++) {
            char both[512];
            snprintf(both, sizeof both, "%s%s", piece[ids[i]], piece[ids[i + 1]]);
            int id = find(both);
            if (id >= 0 && (best < 0 || score[id] > score[best])) best = id, where = i;
        }
        if (best < 0) return n;
        ids[where] = best;
        memmove(ids + where + 1, ids + where + 2, (--n - where - 1) * sizeof *ids);
    }
}

static void product(float *out, const float *matrix, const float *x, int rows, int columns) {
    for (int r = 0; r < rows; r++) {
        double sum = 0;
        for (int c = 0; c < columns; c++) sum += (double)matrix[(long)r * columns + c] * x[c];
        out[r] = sum;
    }
}

static void norm(float *out, const float *x, const float *weight, int n) {
    double square = 0;
    for (int i = 0; i < n; i++) square += (double)x[i] * x[i];
    for (int i = 0; i < n; i++) out[i] = weight[i] * x[i] / sqrt(square / n + 1e-5);
}

static void turn(float *x, int n, int width, int position) {
    for (int i = 0; i < n; i += 2) {
        double angle = position * pow(10000, -(double)(i % width) / width), a = x[i], b = x[i + 1];
        x[i] = a * cos(angle) - b * sin(angle);
        x[i + 1] = a * sin(angle) + b * cos(angle);
    }
}

static int next(const int *ids, int n) {  /* the likeliest token after all of them, computed anew */
    int D = head_of[DIM], F = head_of[HIDDEN], L = head_of[LAYERS], H = head_of[HEADS], K = head_of[KV];
    int E = D / H, kv = K * E, is_tied = head_of[VOCAB] > 0;
    float *embed = all, *p = all + (long)vocab * D, *part[9];
    long sizes[9] = {D, (long)D * D, (long)kv * D, (long)kv * D, (long)D * D, D, (long)F * D, (long)D * F, (long)F * D};
    for (int i = 0; i < 9; p += L * sizes[i++]) part[i] = p;
    float *last = p, *head = is_tied ? embed : p + D + (long)head_of[CONTEXT] * E;
    float *x = malloc(n * D * sizeof *x), *k = malloc(n * kv * sizeof *x), *v = malloc(n * kv * sizeof *x);
    float h[D], q[D], mixed[D], out[D], gate[F], up[F];
    for (int t = 0; t < n; t++) memcpy(x + t * D, embed + (long)ids[t] * D, D * sizeof *x);
    for (int l = 0; l < L; l++) {
        float *w[9];
        for (int i = 0; i < 9; i++) w[i] = part[i] + l * sizes[i];
        for (int t = 0; t < n; t++) {
            norm(h, x + t * D, w[0], D);
            product(k + t * kv, w[2], h, kv, D);
            product(v + t * kv, w[3], h, kv, D);
            turn(k + t * kv, kv, E, t);
        }
        for (int t = 0; t < n; t++) {
            norm(h, x + t * D, w[0], D);
            product(q, w[1], h, D, D);
            turn(q, D, E, t);
            for (int a = 0; a < H; a++) {
                int from = a / (H / K) * E;
                double weight[n], most = -1e30, total = 0, sum;
                for (int s = 0; s <= t; s++) {
                    for (sum = 0, weight[s] = 0; sum < E; sum++)
                        weight[s] += (double)q[a * E + (int)sum] * k[s * kv + from + (int)sum];
                    most = fmax(most, weight[s] /= sqrt(E));
                }
                for (int s = 0; s <= t; s++) total += weight[s] = exp(weight[s] - most);
                for (int e = 0; e < E; e++) {
                    for (int s = sum = 0; s <= t; s++) sum += weight[s] / total * v[s * kv + from + e];
                    mixed[a * E + e] = sum;
                }
            }
            product(out, w[4], mixed, D, D);
            for (int i = 0; i < D; i++) x[t * D + i] += out[i];
            norm(h, x + t * D, w[5], D);
            product(gate, w[6], h, F, D);
            product(up, w[8], h, F, D);
            for (int i = 0; i < F; i++) gate[i] *= up[i] / (1 + exp(-gate[i]));
            product(out, w[7], gate, D, F);
            for (int i = 0; i < D; i++) x[t * D + i] += out[i];
        }
    }
    float *logits = malloc(vocab * sizeof *logits);
    norm(h, x + (n - 1) * D, last, D);
    product(logits, head, h, vocab, D);
    int best = 0;
    for (int i = 1; i < vocab; i++)
        if (logits[i] > logits[best]) best = i;
    free(x), free(k), free(v), free(logits);
    return best;
}

static void print(int before, int id) {
    const char *text = piece[id] + (before == 1 && piece[id][0] == ' ');
    unsigned byte;
    char one[2] = {0};
    if (sscanf(text, "<0x%2X>", &byte) == 1) one[0] = byte, text = one;
    if (text[0] && !text[1] && !isprint((unsigned char)text[0]) && !isspace((unsigned char)text[0])) return;
    fputs(text, stdout);
}

int main(int count, char **words) {
    long size;
    char *data = slurp(words[1], &size);
    memcpy(head_of, data, sizeof head_of);
    vocab = abs(head_of[VOCAB]);
    all = (float *)(data + sizeof head_of);
    read_pieces(words[2]);
    const char *prompt = count > 4 ? words[4] : "";
    int wanted = atoi(words[3]), *ids = calloc(strlen(prompt) + wanted + 9, sizeof *ids), n = encode(prompt, ids);
    for (int i = 1; i < n; i++) print(ids[i - 1], ids[i]);
    for (int made = 0; made < wanted && n < head_of[CONTEXT]; made++, n++) {
        ids[n] = next(ids, n);
        if (ids[n] == 1) break;
        print(ids[n - 1], ids[n]);
    }
    return 0;
}
