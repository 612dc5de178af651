// The RPC tutorial's client, on amqp091-go: client N... prints fib(N), a line each, in order.
//
// Up to 16 calls are outstanding at once.
package main

import (
	"context"
	"fmt"
	"log"
	"math/rand"
	"os"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

const inFlight = 16

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

// As in the tutorial: 32 letters.
func randomString() string {
	letters := make([]byte, 32)
	for i := range letters {
		letters[i] = byte('A' + rand.Intn(26))
	}
	return string(letters)
}

func main() {
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

	numbers := os.Args[1:]
	answers := make([]string, len(numbers))
	pending := map[string]int{} // correlation id -> place in the output
	waitUntilPendingAtMost := func(count int) {
		for len(pending) > count {
			reply, open := <-replies
			if !open {
				log.Fatal("the connection is lost")
			}
			if place, known := pending[reply.CorrelationId]; known {
				answers[place] = string(reply.Body)
				delete(pending, reply.CorrelationId)
			}
		}
	}
	for place, n := range numbers {
		waitUntilPendingAtMost(inFlight - 1)
		id := randomString()
		pending[id] = place
		check(channel.PublishWithContext(context.Background(), "", env("RPC_QUEUE", "rpc_queue"), false, false, amqp.Publishing{
			ContentType:   "text/plain",
			CorrelationId: id,
			ReplyTo:       queue.Name,
			Body:          []byte(n),
		}))
	}
	waitUntilPendingAtMost(0)
	for _, answer := range answers {
		fmt.Println(answer)
	}
}
