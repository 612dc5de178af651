// The RPC tutorial's client, on amqp091-go: client N... prints fib(N) for each N, one per line, in order.
//
// Up to RPC_IN_FLIGHT calls are outstanding at once, 16 unless it is set. With RPC_REPEAT=K it asks for
// each N K times, and prints the number of calls, the seconds they took, and the median of their
// latencies in microseconds, instead of the answers.
package main

import (
	"context"
	"fmt"
	"log"
	"math/rand"
	"os"
	"sort"
	"strconv"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func env(name, otherwise string) string {
	if value := os.Getenv(name); value != "" {
		return value
	}
	return otherwise
}

func envNumber(name, otherwise string) int {
	number, err := strconv.Atoi(env(name, otherwise))
	check(err)
	return number
}

// As in the tutorial: 32 letters.
func randomString() string {
	letters := make([]byte, 32)
	for i := range letters {
		letters[i] = byte('A' + rand.Intn(26))
	}
	return string(letters)
}

func main() {
	server := env("RPC_QUEUE", "rpc_queue")
	inFlight := envNumber("RPC_IN_FLIGHT", "16")
	numbers := os.Args[1:]
	count := len(numbers) * envNumber("RPC_REPEAT", "1")

	rand.Seed(time.Now().UnixNano())
	connection, err := amqp.Dial(env("AMQP_URL", "amqp://localhost"))
	check(err)
	defer connection.Close()
	channel, err := connection.Channel()
	check(err)
	queue, err := channel.QueueDeclare("", false, false, true, false, nil)
	check(err)
	replies, err := channel.Consume(queue.Name, "", true, false, false, false, nil)
	check(err)

	answers := make([]string, count)
	began := make([]time.Time, count)
	latencies := make([]time.Duration, 0, count)
	pending := map[string]int{} // correlation id -> place in the output
	waitUntilPendingAtMost := func(count int) {
		for len(pending) > count {
			reply, open := <-replies
			if !open {
				log.Fatal("the connection is lost")
			}
			if place, known := pending[reply.CorrelationId]; known {
				latencies = append(latencies, time.Since(began[place]))
				answers[place] = string(reply.Body)
				delete(pending, reply.CorrelationId)
			}
		}
	}
	start := time.Now()
	for place := 0; place < count; place++ {
		waitUntilPendingAtMost(inFlight - 1)
		id := randomString()
		pending[id] = place
		began[place] = time.Now()
		check(channel.PublishWithContext(context.Background(), "", server, false, false, amqp.Publishing{
			ContentType:   "text/plain",
			CorrelationId: id,
			ReplyTo:       queue.Name,
			Body:          []byte(numbers[place%len(numbers)]),
		}))
	}
	waitUntilPendingAtMost(0)
	seconds := time.Since(start).Seconds()
	if os.Getenv("RPC_REPEAT") != "" {
		sort.Slice(latencies, func(i, j int) bool { return latencies[i] < latencies[j] })
		fmt.Printf("%d %.6f %.1f\n", count, seconds, float64(latencies[count/2].Nanoseconds())/1e3)
		return
	}
	for _, answer := range answers {
		fmt.Println(answer)
	}
}
