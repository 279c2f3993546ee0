/* Votes on their way from the queue to the database: two replicas, one queue, a primary and its synchronous standby.
 *
 * README.md beside this file says what is checked and what is left out; check.py has spin check it. Every option of
 * the loops at the end is one step that happens as a whole; between two of them anybody may take any of theirs.
 */

#define REPLICAS 2
#ifndef MESSAGES
#define MESSAGES 3
#endif
#ifndef VOTES
#define VOTES 2                  /* fewer than messages: the last message is a copy of message 0 */
#endif
#ifndef WATCHED
#define WATCHED 0
#endif
#define VOTE(m) ((m) % VOTES)
#define PREFETCH 2
#ifndef LIMIT
#define LIMIT 3                  /* the delivery limit: the broker drops a message that was returned more often */
#endif
#ifndef FAULTS
#define FAULTS 1                 /* crashes and connection losses: each may cost a message one return */
#endif
#ifndef INCIDENTS
#define INCIDENTS 1              /* each may cost a message one return for each replica */
#endif

#define CAN_QUEUE_ACK(r) (replica[r].settle == 0)
#ifdef WRITES_AHEAD
#define MAY_FORM_BATCH(r) true   /* also while the ack of the batch before it has not been sent */
#else
#define MAY_FORM_BATCH(r) CAN_QUEUE_ACK(r)
#endif
#ifdef NO_IDENTITY
#define STANDS(v) false
#else
#define STANDS(v) (count[v] > 0)
#endif
#ifdef NO_RECORD_FOR_COPIES
#define LEAVES_RECORD fresh
#else
#define LEAVES_RECORD true
#endif
#ifdef NO_TRIAL_WRITE
#define TRIAL_WORKS true
#else
#define TRIAL_WORKS (!refusing && received == log)
#endif
#ifdef STANDBY_AWAY
#define STANDBY_LISTENS (!calm)
#else
#define STANDBY_LISTENS true
#endif
#ifdef ACK_ANY_CHANNEL
#define IS_FOR_THIS_CHANNEL(r) true
#define STALE(t) t
#else
#define IS_FOR_THIS_CHANNEL(r) replica[r].settle_is_current
#define STALE(t) (t > 0)         /* nobody asks for its number any more: so there are fewer states */
#endif

/* --- the queue --- */

#define READY 2                  /* 0 or 1: unacked, on the channel of that replica */
#define GONE 3
#if MESSAGES > 2
byte at[3] = { READY, READY, READY };
#else
byte at[3] = { READY, READY, GONE };
#endif
byte tag[MESSAGES];              /* the delivery tag, while unacked */
byte returns;                    /* of message WATCHED only: nothing but the limit depends on it */

/* --- the database: the log of the primary, and how much of it the standby has --- */

byte log;                        /* records that count votes; any other record is known by how many came before it */
byte received;                   /* so many of them the standby has */
byte count[VOTES];               /* on the primary, where the identity stands as soon as this is not 0 */
byte record[VOTES];              /* the record that counted the vote, from 1 */
bool refusing;                   /* an incident: no commit is acknowledged, but it may have happened */

/* --- the replicas --- */

mtype = { NO_BATCH, WRITING, WAITING };
typedef Replica {
    bool consuming;
    byte last_tag;               /* of the present channel */
    mtype phase = NO_BATCH;      /* WAITING: the primary has committed, the standby may not have it yet */
    byte batch;                  /* a bit for each message */
    byte through;                /* the last tag of the batch */
    bool is_current;             /* whether the batch came on the present channel: generations are only compared */
    byte waits_for;              /* the standby must have received so many records */
    byte settle;                 /* to be acked through this tag; 0: nothing */
    bool settle_is_current;
}
Replica replica[REPLICAS];

byte faults = FAULTS;
byte incidents = INCIDENTS;
bool calm;                       /* from here on nothing fails; it may never come to that */

#define HOLDS(r) ((at[0] == r) + (at[1] == r) + (at[2] == r))
#define MAY_TAKE(r, m) (at[m] == READY && replica[r].consuming && HOLDS(r) < PREFETCH)
#define IS_SETTLED(r, m) (replica[r].settle_is_current && tag[m] <= replica[r].settle)
#define IS_NEW(r, m) (at[m] == r && !IS_SETTLED(r, m))
#define IN_BATCH(r, m) (replica[r].batch >> (m) & 1)
#define SURVIVES(v) (record[v] > 0 && record[v] <= received)
#define ALL_GONE (at[0] == GONE && at[1] == GONE && at[2] == GONE)
#define ALL_COUNTED (ALL_GONE && count[0] == 1 && count[VOTES - 1] == 1)

#ifndef HIDDEN
#define HIDDEN hidden            /* spin has no breadth-first search with it */
#endif
HIDDEN byte m, v, fresh, kept;   /* of one step only, and no part of the state */

#ifdef SEEN                     /* what has happened, for the check that it can happen */
bool in_doubt, only_copies[REPLICAS], copies_acknowledged;
bool saw_ambiguous_commit_acked, saw_promotion_after_copies, saw_give_back, saw_stale_ack, saw_vote_forgotten;
#define NOTE(fact) fact
#else
#define NOTE(fact) skip
#endif

/* Never lost: each vote is in the queue, or counted in what is left when the primary dies. */
inline check_kept() {
    for (v : 0 .. VOTES - 1) {
        kept = SURVIVES(v);
        for (m : 0 .. MESSAGES - 1) { kept = kept || (VOTE(m) == v && at[m] != GONE) }
        assert(kept)
    }
    kept = 0
}

inline deliver(r, m) {
    replica[r].last_tag++; at[m] = r; tag[m] = replica[r].last_tag;
    printf("replica %d is delivered message %d with tag %d\n", r, m, tag[m])
}

/* What is unacked on a channel is returned when the channel goes; tags begin at 1 again on the next one. */
inline close_channel(r) {
    for (m : 0 .. MESSAGES - 1) {
        if
        :: at[m] == r ->
            printf("message %d is returned to the queue\n", m);
            at[m] = READY; tag[m] = 0; returns = returns + (m == WATCHED); assert(returns <= LIMIT)
        :: else
        fi
    }
    replica[r].last_tag = 0;
    replica[r].is_current = false; replica[r].through = STALE(replica[r].through);
    replica[r].settle_is_current = false; replica[r].settle = STALE(replica[r].settle)
}

inline let_batch_go(r) {
    replica[r].phase = NO_BATCH; replica[r].batch = 0; replica[r].through = 0; replica[r].is_current = false;
    replica[r].waits_for = 0
}

inline queue_ack(r) {
    printf("replica %d queues an ack through tag %d\n", r, replica[r].through);
    replica[r].settle = replica[r].through; replica[r].settle_is_current = replica[r].is_current
}

/* All deliveries that no batch has had yet. */
inline form_batch(r) {
    printf("replica %d forms a batch through tag %d\n", r, replica[r].last_tag);
    for (m : 0 .. MESSAGES - 1) {
        if
        :: IS_NEW(r, m) -> replica[r].batch = replica[r].batch | (1 << m)
        :: else
        fi
    }
    replica[r].phase = WRITING; replica[r].through = replica[r].last_tag; replica[r].is_current = true;
#ifdef ACK_BEFORE_COMMIT
    queue_ack(r)
#else
    skip
#endif
}

/* Identities and counts are one record of the log: all of the batch or nothing of it. */
inline commit(r) {
    fresh = false;
    for (m : 0 .. MESSAGES - 1) {
        if
        :: IN_BATCH(r, m) && !STANDS(VOTE(m)) ->
            printf("the commit of replica %d counts vote %d\n", r, VOTE(m));
            fresh = true; record[VOTE(m)] = log + 1; count[VOTE(m)]++; assert(count[VOTE(m)] <= 1)
        :: IN_BATCH(r, m) && STANDS(VOTE(m)) -> printf("the commit of replica %d finds vote %d counted\n", r, VOTE(m))
        :: else
        fi
    }
    log = log + fresh;
    replica[r].waits_for = (LEAVES_RECORD -> log : 0); replica[r].phase = WAITING;
    NOTE(only_copies[r] = !fresh)
}

/* The replica has an error and knows no more: it keeps the batch unacked, to be written again, and fetches nothing. */
inline hold(r) {
    replica[r].phase = WRITING; replica[r].waits_for = 0;
#ifdef NO_HOLD
    close_channel(r); let_batch_go(r)
#else
    replica[r].consuming = false
#endif
}

inline ack(r) {
    if
    :: IS_FOR_THIS_CHANNEL(r) ->
        for (m : 0 .. MESSAGES - 1) {
            if
            :: at[m] == r && tag[m] <= replica[r].settle ->
                printf("message %d is acked by replica %d through tag %d, and gone\n", m, r, replica[r].settle);
                at[m] = GONE; tag[m] = 0;
                NOTE(saw_ambiguous_commit_acked = saw_ambiguous_commit_acked || (m == 0 && in_doubt))
            :: else
            fi
        }
        check_kept()
    :: else ->
        printf("replica %d drops the ack of a former channel\n", r);
        NOTE(saw_stale_ack = true)
    fi;
    replica[r].settle = 0; replica[r].settle_is_current = false
}

/* The standby becomes the database, with what it has received; another one, with all of that, takes its place. */
inline promote() {
    printf("the primary dies, the standby is promoted\n");
    for (v : 0 .. VOTES - 1) {
        if
        :: record[v] > received -> record[v] = 0; count[v] = 0; NOTE(saw_vote_forgotten = true)
        :: else
        fi
    }
    log = received;
    if :: replica[0].phase == WAITING -> hold(0) :: else fi;
    if :: replica[1].phase == WAITING -> hold(1) :: else fi;
    NOTE(saw_promotion_after_copies = saw_promotion_after_copies || copies_acknowledged);
    check_kept()
}

active [REPLICAS] proctype Replicas() {
    byte r = _pid;
    do
    /* the queue and the consumer */
    :: d_step { MAY_TAKE(r, 0) -> deliver(r, 0) }
    :: d_step { MAY_TAKE(r, 1) -> deliver(r, 1) }
    :: d_step { MAY_TAKE(r, 2) -> deliver(r, 2) }
    :: d_step { replica[r].settle > 0 -> ack(r) }

    /* the batcher */
    :: d_step { !replica[r].consuming && replica[r].phase == NO_BATCH && TRIAL_WORKS ->
        printf("replica %d starts to consume\n", r);
        replica[r].consuming = true }
    :: d_step { replica[r].phase == NO_BATCH && MAY_FORM_BATCH(r) && (IS_NEW(r, 0) || IS_NEW(r, 1) || IS_NEW(r, 2)) ->
        form_batch(r) }
    :: d_step { replica[r].phase == WRITING && !replica[r].is_current ->
        printf("replica %d lets a batch of a former channel go\n", r);
        let_batch_go(r) }
    :: d_step { replica[r].phase == WRITING -> commit(r) }
    :: d_step { replica[r].phase == WRITING && !calm ->
        printf("the batch of replica %d is refused\n", r);       /* or rolled back, or never got there */
        hold(r) }
    :: d_step { replica[r].phase == WAITING && !calm ->
        printf("replica %d gets an error, its commit has happened\n", r);
        NOTE(in_doubt = in_doubt || IN_BATCH(r, 0));
        hold(r) }
    :: d_step { replica[r].phase == WAITING && received >= replica[r].waits_for && !refusing && CAN_QUEUE_ACK(r) ->
        printf("the commit of replica %d is acknowledged\n", r);
        NOTE(copies_acknowledged = copies_acknowledged || only_copies[r]);
#ifndef ACK_BEFORE_COMMIT
        queue_ack(r);
#endif
        let_batch_go(r);
        replica[r].consuming = true }
    :: d_step { replica[r].phase == WRITING && replica[r].is_current && refusing && !replica[r].consuming ->
        printf("replica %d has held for long enough and gives back\n", r);
        NOTE(saw_give_back = true);
        close_channel(r);
        let_batch_go(r) }

    /* its faults */
    :: d_step { faults > 0 && !calm ->
        printf("replica %d loses its connection to the broker\n", r);
        faults--;
        close_channel(r) }
    :: d_step { faults > 0 && !calm ->
        printf("replica %d crashes\n", r);
        faults--;
        close_channel(r);
        let_batch_go(r);
        replica[r].settle = 0; replica[r].consuming = false }

    :: ALL_GONE -> break
    od
}

active proctype Database() {
    do
    :: d_step { received < log && STANDBY_LISTENS -> printf("the standby receives a record\n"); received++ }
    :: d_step { !calm -> promote() }
    :: d_step { !calm && !refusing && incidents > 0 ->
        printf("an incident begins\n");
        incidents--; refusing = true }
    :: d_step { refusing -> printf("the incident is over\n"); refusing = false }
    :: d_step { !calm && !refusing -> printf("nothing fails any more\n"); calm = true }
    :: ALL_GONE && received == log -> break
    od
}

#ifdef ENDING
ltl all_counted { [] (calm -> <> ALL_COUNTED) }
#endif

#ifdef SEEN                      /* each of these is to be found wrong */
ltl ambiguous_commit_acked { [] !saw_ambiguous_commit_acked }
ltl promotion_after_copies { [] !saw_promotion_after_copies }
ltl give_back { [] !saw_give_back }
ltl stale_ack_dropped { [] !saw_stale_ack }
ltl forgotten_then_counted { [] !(saw_vote_forgotten && ALL_COUNTED) }
ltl limit_reached { [] !(returns == LIMIT) }
#endif
