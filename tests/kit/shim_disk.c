/* Preloaded into a process: writes down, in their order, what it does to the files under one folder and to
   its sockets, data included. From that the files can be made as a power cut at any moment leaves them.

   STOCKRT_SHIM_FOLDER  the folder
   STOCKRT_SHIM_LOG     where to write
   STOCKRT_SHIM_SLOW    a file that holds for how many seconds each sync waits, while it exists

   A record: kind (1 byte), descriptor (int32), offset (int64), length (uint32), data. Kinds:
     O open (data: path; offset 1: made by this)   W write at offset   T truncate to offset   S synced
     U unlink (path)       R rename (old \0 new)
     > sent (before it is)   < received (after it was)   C socket closed (before it is)
   Records of file operations are in the order of the operations, as one lock is held over both. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MAX_FD 4096
#define NEXT(name) ((__typeof__(&name))next(#name))

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char ours[MAX_FD];
static int log_fd = -1;
static char folder[PATH_MAX];
static const char *slow;

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }

static ssize_t (*real_write)(int, const void *, size_t);

__attribute__((constructor)) static void begin(void) {
    const char *log = getenv("STOCKRT_SHIM_LOG"), *place = getenv("STOCKRT_SHIM_FOLDER");
    real_write = NEXT(write);
    slow = getenv("STOCKRT_SHIM_SLOW");
    if (log && place && strlen(place) < sizeof folder) {
        strcpy(folder, place);
        log_fd = NEXT(open)(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    }
}

static void put(char kind, int fd, int64_t offset, const void *data, uint32_t length) {
    char head[17];
    int32_t number = fd;
    int kept = errno;
    head[0] = kind;
    memcpy(head + 1, &number, 4);
    memcpy(head + 5, &offset, 8);
    memcpy(head + 13, &length, 4);
    struct iovec parts[2] = {{head, 17}, {(void *)data, length}};
    if (log_fd >= 0 && writev(log_fd, parts, length ? 2 : 1) < 0) abort();
    errno = kept;
}

static int watched(int fd) { return fd >= 0 && fd < MAX_FD && ours[fd]; }

static int is_socket(int fd) {
    struct stat found;
    return fstat(fd, &found) == 0 && S_ISSOCK(found.st_mode);
}

static int under(const char *path) {
    return *folder && strncmp(path, folder, strlen(folder)) == 0;
}

static int opened(int fd, const char *path, int flags, int is_new) {
    if (fd < 0 || fd >= MAX_FD) return fd;
    ours[fd] = under(path);
    if (ours[fd]) {
        put('O', fd, is_new, path, strlen(path));
        if (flags & O_TRUNC) put('T', fd, 0, "", 0);
    }
    return fd;
}

#define OPEN(name)                                                   \
    int name(const char *path, int flags, ...) {                     \
        va_list rest;                                                \
        va_start(rest, flags);                                       \
        mode_t mode = va_arg(rest, mode_t);                          \
        va_end(rest);                                                \
        pthread_mutex_lock(&lock);                                   \
        int is_new = flags & O_CREAT && NEXT(access)(path, F_OK);    \
        int fd = opened(NEXT(name)(path, flags, mode), path, flags, is_new); \
        pthread_mutex_unlock(&lock);                                 \
        return fd;                                                   \
    }
OPEN(open)
OPEN(open64)

int close(int fd) {
    pthread_mutex_lock(&lock);
    if (watched(fd)) ours[fd] = 0;
    else if (is_socket(fd)) put('C', fd, 0, "", 0);
    int done = NEXT(close)(fd);
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t write(int fd, const void *data, size_t size) {
    if (!watched(fd)) {
        if (is_socket(fd)) put('>', fd, 0, data, size);
        return real_write(fd, data, size);
    }
    pthread_mutex_lock(&lock);
    int64_t at = fcntl(fd, F_GETFL) & O_APPEND ? lseek(fd, 0, SEEK_END) : lseek(fd, 0, SEEK_CUR);
    ssize_t done = real_write(fd, data, size);
    if (done > 0) put('W', fd, at, data, done);
    pthread_mutex_unlock(&lock);
    return done;
}

#define PWRITE(name, offset_type)                                             \
    ssize_t name(int fd, const void *data, size_t size, offset_type offset) { \
        if (!watched(fd)) return NEXT(name)(fd, data, size, offset);          \
        pthread_mutex_lock(&lock);                                            \
        ssize_t done = NEXT(name)(fd, data, size, offset);                    \
        if (done > 0) put('W', fd, offset, data, done);                       \
        pthread_mutex_unlock(&lock);                                          \
        return done;                                                          \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define TRUNCATE(name, offset_type)                      \
    int name(int fd, offset_type size) {                 \
        pthread_mutex_lock(&lock);                       \
        int done = NEXT(name)(fd, size);                 \
        if (!done && watched(fd)) put('T', fd, size, "", 0); \
        pthread_mutex_unlock(&lock);                     \
        return done;                                     \
    }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

/* Outside of the lock: a slow disk holds up those alone who wait for it. */
static void wait_for_disk(void) {
    FILE *file = slow ? fopen(slow, "r") : NULL;
    double seconds = 0;
    if (!file) return;
    if (fscanf(file, "%lf", &seconds) == 1 && seconds > 0) {
        struct timespec left = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
        while (nanosleep(&left, &left) && errno == EINTR) {}
    }
    fclose(file);
}

#define SYNC(name)                                    \
    int name(int fd) {                                \
        if (watched(fd)) wait_for_disk();             \
        pthread_mutex_lock(&lock);                    \
        int done = NEXT(name)(fd);                    \
        if (!done && watched(fd)) put('S', fd, 0, "", 0); \
        pthread_mutex_unlock(&lock);                  \
        return done;                                  \
    }
SYNC(fsync)
SYNC(fdatasync)

int unlink(const char *path) {
    pthread_mutex_lock(&lock);
    int done = NEXT(unlink)(path);
    if (!done && under(path)) put('U', -1, 0, path, strlen(path));
    pthread_mutex_unlock(&lock);
    return done;
}

int rename(const char *old, const char *new) {
    pthread_mutex_lock(&lock);
    int done = NEXT(rename)(old, new);
    if (!done && under(new)) {
        char both[2 * PATH_MAX];
        size_t first = strlen(old) + 1, second = strlen(new);
        if (first + second > sizeof both) abort();
        memcpy(both, old, first);
        memcpy(both + first, new, second);
        put('R', -1, 0, both, first + second);
    }
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t send(int fd, const void *data, size_t size, int flags) {
    put('>', fd, 0, data, size);
    return NEXT(send)(fd, data, size, flags);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    for (size_t i = 0; i < message->msg_iovlen; i++)
        put('>', fd, 0, message->msg_iov[i].iov_base, message->msg_iov[i].iov_len);
    return NEXT(sendmsg)(fd, message, flags);
}

ssize_t recv(int fd, void *data, size_t size, int flags) {
    ssize_t done = NEXT(recv)(fd, data, size, flags);
    if (done > 0) put('<', fd, 0, data, done);
    return done;
}
